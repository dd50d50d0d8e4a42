"""What the command line does with Slurm."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import measuring
from benchmarks import plan as planning
from benchmarks.display import counts_line
from benchmarks.errors import UserError
from benchmarks.executors.local import Sweep
from benchmarks.executors.slurm import launcher
from benchmarks.executors.slurm.attempts import Attempts, Cause, most_at_once
from benchmarks.executors.slurm.cluster import Cluster, Polling, load_cluster
from benchmarks.executors.slurm.scheduler import Slurm
from benchmarks.plan import Plan
from benchmarks.run import Run
from benchmarks.store import RunFolder, State, Store

_OVER = (State.DONE, State.FAILED)


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

    def jobs_at_once(self, plan: Plan, since: float) -> int:
        """See ``attempts.most_at_once``."""
        return most_at_once(plan, Store(self.options.runs_dir), since)

    def measure(
        self,
        plan: Plan,
        profile: str,
        missing: Sequence[Run],
        request: Mapping[str, Any],
        tell: Callable[[str], None],
    ) -> list[str]:
        """Measure finished runs, each in a job or beside others in one.

        Args:
            plan: Of the profile.
            profile: Its name.
            missing: Those that lack a measurement.
            request: What to measure.
            tell: Takes a line for the user.

        Returns:
            A line for each measurement that failed and each eigenvalue that did not converge.

        Raises:
            KeyboardInterrupt: The jobs go on.
        """
        trained = Store(self.options.runs_dir)
        measurements, root, copy = measuring.prepare(plan, profile, trained, missing, request)
        store = Store(root)
        for run in measurements.runs:
            if store.folder(run).state() is State.FAILED:
                self.retry(store.folder(run))
        of_runs = ("--trained-dir", str(trained.root), "--trained-plan", str(copy))
        what = ("--request", json.dumps(request))
        command = ("-m", "benchmarks", "measure", *of_runs, *what)

        def observe(sweep: Sweep, changed: Run | None) -> None:
            if changed is not None and (state := sweep.states[changed.identity]) in _OVER:
                left = sum(s not in _OVER for s in sweep.states.values())
                tell(f"{state:<11} {changed.label} ({left} left)")

        options = replace(self.options, runs_dir=root, command=command)
        scheduler = Slurm(options.cluster, root / launcher.FOLDER / "jobs")
        sweep = launcher.execute(measurements, options, scheduler, observe, tell)
        lines = []
        for run in measurements.runs:
            if sweep.states[run.identity] is State.DONE:
                lines += store.folder(run).result()["unconverged"]
            else:
                reason = sweep.reasons.get(run.identity, "not measured")
                lines.append(f"{run.label}: {reason}")
        return lines

    def retry(self, folder: RunFolder) -> None:
        """Let a failed run be tried again, with no attempt held against it."""
        Attempts(folder).end("", Cause.FORGIVEN)
        folder.retry()


class Watcher:
    """Shows what Slurm has of a plan's runs and of their measurements, without a cluster's file.

    Args:
        plan: The runs.
        runs_dir: Where their folders are.
        profile: The name of their profile.
    """

    def __init__(self, plan: Plan, runs_dir: Path, profile: str) -> None:
        self.plan = plan
        self.runs_dir = runs_dir.resolve()
        self.profile = profile
        self._scheduler: Slurm | None = None

    def notes(self) -> dict[str, str]:
        """A line about the job of each run that has one, by identity; empty without Slurm."""
        return self._notes(self.plan, self.runs_dir)

    def measurements(self) -> tuple[list[str], bool]:
        """A line for each set of measurements in jobs, and whether any of them is at work."""
        lines, at_work = [], False
        for plan, root in self._measurements():
            states, jobs = Store(root).states(plan), self._notes(plan, root)
            at_work |= bool(jobs) or State.RUNNING in states.values()
            lines.append(f"measuring {root.name}: {counts_line(states)}, {len(jobs)} with a job")
        return lines, at_work

    def cancel(self) -> list[str]:
        """See ``launcher.cancel``."""
        jobs = launcher.cancel(self.plan, self.runs_dir, self._slurm())
        for plan, root in self._measurements():
            jobs += launcher.cancel(plan, root, self._slurm())
        return jobs

    def _measurements(self) -> Iterator[tuple[Plan, Path]]:
        for root in measuring.roots(self.runs_dir, self.profile):
            yield planning.read(measuring.plan_file(root, self.profile)), root

    def _notes(self, plan: Plan, root: Path) -> dict[str, str]:
        if shutil.which("squeue") is None or not (root / launcher.FOLDER).is_dir():
            return {}
        return launcher.notes(plan, root, self._slurm())

    def _slurm(self) -> Slurm:
        if self._scheduler is None:
            polite = Cluster(title="", polling=Polling(queue_seconds=10.0))
            self._scheduler = Slurm(polite, self.runs_dir / launcher.FOLDER / "jobs")
        return self._scheduler
