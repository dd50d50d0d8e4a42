"""The tests on a real Slurm. ``make test-slurm`` starts it and names its folder; without, none."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import plan as planning
from benchmarks.executors.slurm.attempts import Attempts, causes
from benchmarks.run import Run
from benchmarks.store import RunFolder, Store
from slurm.loopback import Cluster
from tests.harness import ROOT, profile_file, record, toml, wait_until

FOLDER = os.environ.get("POF_LOOPBACK")
collect_ignore_glob = [] if FOLDER else ["test_*.py"]

PATIENCE = 400.0
COUNTED = ("sbatch", "squeue", "sacct", "scancel", "scontrol")


class Launched:
    """A command of the benchmark at work, and what it has said."""

    def __init__(self, process: subprocess.Popen, log: Path) -> None:
        self.process = process
        self.log = log

    @property
    def said(self) -> str:
        return self.log.read_text()

    def wait_for(self, words: str) -> None:
        wait_until(lambda: words in self.said or self.process.poll() is not None, PATIENCE)
        assert words in self.said, self.said

    def wait(self) -> int:
        return self.process.wait(PATIENCE)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Lab:
    """A profile, a cluster and the folders of one test."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder = folder
        self.cluster = cluster
        self.runs_dir = folder / "runs"
        self.results = folder / "results"
        self.launched: list[Launched] = []
        self.environment = cluster.environment() | {"COLUMNS": "200"}
        self._count_calls()

    def _count_calls(self) -> None:
        """Put Slurm's commands behind scripts that note each call."""
        wrappers = self.folder / "bin"
        wrappers.mkdir()
        for name in COUNTED:
            real = shutil.which(name)
            path = wrappers / name
            path.write_text(f'#!/bin/sh\necho {name} >> "{self.folder}/calls"\nexec {real} "$@"\n')
            path.chmod(0o755)
        self.environment["PATH"] = f"{wrappers}:{self.environment['PATH']}"

    def break_command(self, name: str) -> None:
        (self.folder / "bin" / name).write_text(
            f'#!/bin/sh\necho {name} >> "{self.folder}/calls"\necho broken >&2\nexit 1\n'
        )

    def calls(self) -> Counter:
        path = self.folder / "calls"
        return Counter(path.read_text().split() if path.exists() else [])

    def cluster_file(self, **changes) -> Path:
        tables = {
            "title": "Loopback",
            "environment": {"POF_CHECKPOINT_SECONDS": "1"},
            "resources": {"time_limit": "5", "memory": "900M", "signal_seconds": 30},
            "polling": {"folders_seconds": 0.5, "queue_seconds": 1.0},
        }
        for key, value in changes.items():
            tables[key] = tables.get(key, {}) | value if isinstance(value, dict) else value
        path = self.folder / "cluster.toml"
        path.write_text(toml(tables))
        return path

    def profile(self, changes: dict) -> Path:
        return profile_file(self.folder, changes)

    def start(self, command: str, *arguments: object) -> Launched:
        """Start ``python -m benchmarks COMMAND`` for the test's profile and folders."""
        folders = ["--runs-dir", self.runs_dir]
        if command in ("reproduce-table", "resubmit"):
            folders += ["--results-dir", self.results]
        options = ["--profile", self.folder / "tiny.toml", *folders, *arguments]
        log = self.folder / f"said-{len(self.launched)}"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks", command, *map(str, options)],
                stdout=file,
                stderr=file,
                env=self.environment,
                cwd=ROOT,
            )
        self.launched.append(Launched(process, log))
        return self.launched[-1]

    def reproduce(self) -> Launched:
        cluster = self.folder / "cluster.toml"
        return self.start("reproduce-table", "--executor", "slurm", "--cluster", cluster)

    def finish(self, command: str, *arguments: object) -> str:
        launched = self.start(command, *arguments)
        assert launched.wait() == 0, launched.said
        return launched.said

    def close(self) -> None:
        for launched in self.launched:
            if launched.process.poll() is None:
                launched.kill()
        subprocess.run(
            ["scancel", f"--user={os.getuid()}"], env=self.cluster.environment(), check=False
        )
        wait_until(lambda: not self.cluster.command("squeue", "-h"), PATIENCE)

    # What came of it

    @property
    def store(self) -> Store:
        return Store(self.runs_dir)

    def plan(self) -> planning.Plan:
        return planning.read(self.runs_dir / "plans" / "tiny.json")

    def run(self, method: str, first: int, seed: int = 0) -> Run:
        return next(
            run
            for run in self.plan().runs
            if (run.method, run.settings.first_epoch, run.settings.seed) == (method, first, seed)
        )

    def folder_of(self, run: Run) -> RunFolder:
        return self.store.folder(run)

    def job_of(self, run: Run) -> str:
        """The job that the run's latest attempt began in."""
        return [e for e in Attempts(self.folder_of(run)).read() if e.event == "begun"][-1].job

    def causes(self, run: Run) -> list[str]:
        return [cause.value for cause, _ in causes(Attempts(self.folder_of(run)).read())]

    def table(self) -> bytes:
        return (self.results / "tiny" / "errors.csv").read_bytes()

    def under_way(self, run: Run) -> int | None:
        """The process that trains a run and has trained an epoch of it, not yet the last."""
        folder = self.folder_of(run)
        progress = folder.progress()
        first, last = run.settings.first_epoch, run.settings.last_epoch
        fresh = first < progress.get("epoch", 0) < last - 1
        return progress["pid"] if fresh and folder.state() == "RUNNING" else None

    def wait_under_way(self, run: Run) -> int:
        wait_until(lambda: self.under_way(run), PATIENCE)
        return self.folder_of(run).progress()["pid"]


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    return Cluster(Path(FOLDER or ""))


@pytest.fixture
def lab(tmp_path, cluster):
    made = Lab(tmp_path, cluster)
    yield made
    made.close()


def parent_of(pid: int) -> int:
    """The process that started another."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def results_of(lab: Lab) -> dict:
    """Every run's epochs and final numbers, weights included, timings aside."""
    return {run.name: record(lab.store, run) for run in lab.plan().runs}
