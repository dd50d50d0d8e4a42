"""What the command line does with Slurm."""

import shutil
from collections.abc import Callable
from pathlib import Path

from benchmarks.errors import UserError
from benchmarks.executors.local import Sweep
from benchmarks.executors.slurm import launcher
from benchmarks.executors.slurm.attempts import Attempts, Cause
from benchmarks.executors.slurm.cluster import Cluster, Polling, load_cluster
from benchmarks.executors.slurm.scheduler import Slurm
from benchmarks.plan import Plan
from benchmarks.run import Run
from benchmarks.store import RunFolder


class OnSlurm:
    """A cluster, ready to carry out a plan.

    Args:
        cluster_file: The cluster's TOML file.
        runs_dir: Where the run folders are.
        data_dir: Where data sets are.
        device: What computes.

    Raises:
        UserError: The file is wrong or missing, or Slurm's commands are.
    """

    def __init__(
        self, cluster_file: Path | None, runs_dir: Path, data_dir: Path, device: str
    ) -> None:
        if cluster_file is None:
            raise UserError(
                "EXECUTOR=slurm needs CLUSTER=FILE.toml (--cluster); slurm/clusters/ has examples"
            )
        self.options = launcher.Options(
            runs_dir=runs_dir.resolve(),
            data_dir=data_dir.resolve(),
            device=device,
            cluster=load_cluster(cluster_file),
        )
        self.scheduler = Slurm(
            self.options.cluster, self.options.runs_dir / launcher.FOLDER / "jobs"
        )

    def execute(
        self,
        plan: Plan,
        observe: Callable[[Sweep, Run | None], None],
        tell: Callable[[str], None],
    ) -> Sweep:
        """See ``launcher.execute``."""
        return launcher.execute(plan, self.options, self.scheduler, observe, tell)

    def retry(self, folder: RunFolder) -> None:
        """Let a failed run be tried again, with no attempt held against it."""
        Attempts(folder).end("", Cause.FORGIVEN)
        folder.retry()


class Watcher:
    """Shows what Slurm has of a plan's runs, without any cluster's file.

    Args:
        plan: The runs.
        runs_dir: Where their folders are.
    """

    def __init__(self, plan: Plan, runs_dir: Path) -> None:
        self.plan = plan
        self.runs_dir = runs_dir.resolve()
        self._scheduler: Slurm | None = None

    def notes(self) -> dict[str, str]:
        """A line about the job of each run that has one, by identity; empty without Slurm."""
        if shutil.which("squeue") is None or not (self.runs_dir / launcher.FOLDER).is_dir():
            return {}
        return launcher.notes(self.plan, self.runs_dir, self._slurm())

    def cancel(self) -> list[str]:
        """See ``launcher.cancel``."""
        return launcher.cancel(self.plan, self.runs_dir, self._slurm())

    def _slurm(self) -> Slurm:
        if self._scheduler is None:
            polite = Cluster(title="", polling=Polling(queue_seconds=10.0))
            self._scheduler = Slurm(polite, self.runs_dir / launcher.FOLDER / "jobs")
        return self._scheduler
