"""The tests on a real Slurm. ``make test-slurm`` starts it and names its folder; without, none."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from benchmarks import plan as planning
from benchmarks.executors.slurm.attempts import Attempts, causes
from benchmarks.executors.slurm.cluster import load_cluster
from benchmarks.executors.slurm.launcher import Launcher, Options
from benchmarks.executors.slurm.scheduler import Slurm
from benchmarks.plan import Plan
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
        self.held: list[int] = []
        self.environment = cluster.environment() | {"COLUMNS": "200"}
        self._count_calls()

    def _count_calls(self) -> None:
        """Put Slurm's commands behind scripts that note each call."""
        (self.folder / "bin").mkdir()
        for name in COUNTED:
            self._wrap(name, f'exec {shutil.which(name)} "$@"')
        self.environment["PATH"] = f"{self.folder}/bin:{self.environment['PATH']}"

    def _wrap(self, name: str, line: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f'#!/bin/sh\necho {name} >> "{self.folder}/calls"\n{line}\n')
        path.chmod(0o755)

    def break_command(self, name: str) -> None:
        self._wrap(name, "echo broken >&2; exit 1")

    def forget_ended_jobs(self) -> None:
        """Let squeue know of jobs that have not ended only, as it does after some minutes."""
        self._wrap("squeue", f'exec {shutil.which("squeue")} "$@" --states=PD,R,CG,S,CF,RQ,RH,SE')

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
        if command in ("reproduce-table", "resubmit", "hessian"):
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
        for pid in self.held:
            if _state_of(pid) == "T":  # left so by a test that failed
                os.kill(pid, signal.SIGKILL)
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

    # Its troubles

    def hold(self, *runs: Run) -> list[int]:
        """Stop the processes that train runs, each in the middle of its run; returns their ids.

        What is held cannot end before its trouble has come, however fast the machine is.
        """
        held: dict[str, int] = {}

        def all_held() -> bool:
            for run in runs:
                pid = None if run.identity in held else self._under_way(run)
                if pid is not None:
                    os.kill(pid, signal.SIGSTOP)
                    held[run.identity] = pid
            return len(held) == len(runs)

        wait_until(all_held, PATIENCE)
        wait_until(lambda: all(_state_of(pid) == "T" for pid in held.values()), PATIENCE)
        self.held += held.values()
        assert all(self.folder_of(run).state() == "RUNNING" for run in runs)
        return [held[run.identity] for run in runs]

    def _under_way(self, run: Run) -> int | None:
        """The process that trains a run and has trained an epoch of it, not yet the last."""
        folder = self.folder_of(run)
        progress = folder.progress()
        first, last = run.settings.first_epoch, run.settings.last_epoch
        fresh = first < progress.get("epoch", 0) < last - 1
        return progress["pid"] if fresh and folder.state() == "RUNNING" else None

    def release_when_told(self, pid: int) -> None:
        """Let a process that is held go on, once it has been told to stop.

        Where Slurm cancels or preempts a job, it continues the job's processes itself.
        """
        wait_until(lambda: _told_or_continued(pid), PATIENCE)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    def preempt(self, run: Run) -> None:
        """Let somebody more important have the node on which a run is being trained."""
        options = ["-p", "urgent", "-w", self.node_of(run), "--exclusive", "-t", "1"]
        self.cluster.command("sbatch", *options, "-o", "/dev/null", "--wrap", "true")

    def node_of(self, run: Run) -> str:
        """The node that the run's job is on."""
        return self.cluster.command("squeue", "-h", "-j", self.job_of(run), "-o", "%N")

    def restarts_of(self, run: Run) -> int:
        """How often Slurm has put the run's job back into the queue."""
        return int(self._shown(run, "Restarts"))

    def state_of_job(self, run: Run) -> str:
        """Slurm's word for it."""
        return self._shown(run, "JobState")

    def _shown(self, run: Run, field: str) -> str:
        job = self.cluster.command("scontrol", "show", "job", "--oneliner", self.job_of(run))
        return dict(word.partition("=")[::2] for word in job.split())[field]


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    return Cluster(Path(FOLDER or ""))


@pytest.fixture
def lab(tmp_path, cluster):
    made = Lab(tmp_path, cluster)
    yield made
    made.close()


def made_up(lab: Lab, monkeypatch, plan: Plan, orders: dict, **changes) -> Launcher:
    """A launcher of runs that train nothing and do what they are ordered to."""
    for name, value in lab.environment.items():
        monkeypatch.setenv(name, value)
    (lab.folder / "orders").write_text(json.dumps(orders))
    environment = {"FAKE_ORDERS": str(lab.folder / "orders"), "PYTHONPATH": str(ROOT)}
    cluster = load_cluster(lab.cluster_file(environment=environment, **changes))
    options = Options(lab.runs_dir, lab.folder, "cpu", cluster, ("-m", "tests.fake_worker", "work"))
    return Launcher(plan, options, Slurm(cluster, lab.runs_dir / "slurm" / "jobs"))


def parent_of(pid: int) -> int:
    """The process that started another."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _status(pid: int) -> dict[str, str]:
    """What the kernel says of a process; empty if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return dict(line.split(":\t", 1) for line in lines)


def _state_of(pid: int) -> str:
    """``T``: stopped; empty: gone."""
    return _status(pid).get("State", "")[:1]


def _told_or_continued(pid: int) -> bool:
    """Whether SIGTERM waits for a process, or it is stopped no more."""
    status = _status(pid)
    told = int(status.get("ShdPnd", "0"), 16) >> (signal.SIGTERM - 1) & 1
    return bool(told) or _state_of(pid) != "T"


def results_of(lab: Lab) -> dict:
    """Every run's epochs and final numbers, weights included, timings aside."""
    return {run.name: record(lab.store, run) for run in lab.plan().runs}
