"""Rows of the harness: how a sweep uses the cores, and how fast a command starts."""

import subprocess
import sys
import tempfile
from pathlib import Path
from shutil import copytree

import torch

from benchmarks import calibrate, forecast
from benchmarks.cost import Estimate, WorkerKind
from benchmarks.executors.local import threads_each
from benchmarks.settings import load_profile
from benchmarks.speed.core import ratios
from benchmarks.speed.row import Bench, Row, Variant

_ROOT = Path(__file__).parent.parent.parent
_PROFILE = "quick"
_HELP, _STATUS, _REPORT = (Variant(name) for name in ("help", "status", "report"))


def _jobs(bench: Bench, _: Variant) -> list[float]:
    """Time of the whole profile from the measured cost of every step, test, save and start."""
    threads = torch.get_num_threads()
    timed: dict[int, list[float]] = {2: [], 1: []}
    try:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            plan = forecast.expand_without_data(load_profile(_PROFILE), folder / "plan.json")
            for _repetition in range(bench.scale.effort.repetitions):
                for jobs, seconds in timed.items():
                    worker = WorkerKind(threads_each(jobs), jobs)
                    measured = calibrate.calibrate(
                        plan,
                        bench.device,
                        worker,
                        lambda _: None,
                        data_dir=bench.data_dir.resolve(),
                        scratch=folder,
                        seconds=bench.scale.calibration_seconds,
                    )
                    source = forecast.Calibrated(measured, worker)
                    predicted = forecast.predict(plan, source, Estimate(None, 1.0))
                    seconds.append(predicted.schedule(jobs).makespan)
    finally:
        torch.set_num_threads(threads)
    return ratios(timed[2], timed[1])


def _arguments(command: str, folder: Path) -> list[str]:
    """A command line of ours that changes nothing but ``folder``."""
    if command == "help":
        return ["--help"]
    arguments = [command, "--profile", "smoke"]
    if command == "status":
        return [*arguments, "--runs-dir", str(folder)]
    copytree(_ROOT / "results" / "smoke", folder / "smoke", dirs_exist_ok=True)
    return [*arguments, "--results-dir", str(folder)]


def _run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, cwd=_ROOT, stdout=subprocess.DEVNULL, check=False)


def _start(bench: Bench, variant: Variant) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        arguments = _arguments(variant.name, Path(folder))
        command = [sys.executable, "-m", "benchmarks", *arguments]
        return bench.alternate({"command": lambda: _run(command).check_returncode()})["command"]


_LOOKS = """
import runpy, sys
try:
    runpy.run_module("benchmarks", run_name="__main__", alter_sys=True)
except SystemExit as end:
    if end.code:
        raise
sys.exit(99 if "torch" in sys.modules else 0)
"""


def _imports_torch(bench: Bench, variant: Variant) -> list[float]:
    """1 if the command imports PyTorch."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", _LOOKS, *_arguments(variant.name, Path(folder))]
        done = _run(command)
    if done.returncode != 99:
        done.check_returncode()
    return [float(done.returncode == 99)]


ROWS = (
    Row(
        "jobs",
        "quick profile with JOBS=2 / JOBS=1, scheduled with the measured cost of its parts",
        _jobs,
        goal=0.9,
    ),
    Row(
        "start",
        "python -m benchmarks --help, status: from the shell to the end",
        _start,
        goal=1.0,
        unit="s",
        variants=(_HELP, _STATUS),
    ),
    Row(
        "imports-torch",
        "whether --help, status, report import torch",
        _imports_torch,
        goal=0.0,
        unit="",
        variants=(_HELP, _STATUS, _REPORT),
    ),
)
