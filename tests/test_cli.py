"""The commands: whole sweeps, interrupted and not, and what a user's mistakes look like."""

import json
import os
import signal
import subprocess
import sys

import pytest
import setuptools
import torch

from benchmarks import assembly, cli
from benchmarks import plan as planning
from benchmarks.store import RunFolder, State, Store
from benchmarks.worker import Ending, Worker
from pof.errors import DataUnavailable
from tests.harness import (
    ROOT,
    exit_status,
    files_of,
    fork,
    profile_file,
    record,
    wait_until,
)

COMMANDS = ["reproduce-table", "report", "status", "doctor", "work"]


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command in this process; returns its exit status, output and error output."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return status, captured.out, captured.err

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Worker processes that make results up; give them orders by label of run."""
    launcher = tmp_path / "python"
    launcher.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tests.fake_worker "$@"\n')
    launcher.chmod(0o755)
    orders = tmp_path / "orders.json"
    orders.write_text("{}")
    monkeypatch.setattr(sys, "executable", str(launcher))
    monkeypatch.setenv("FAKE_ORDERS", str(orders))
    monkeypatch.chdir(ROOT)
    return lambda what: orders.write_text(json.dumps(what))


def options(folder, profile):
    return (
        *("--profile", profile, "--data-dir", folder / "data", "--device", "cpu"),
        *("--runs-dir", folder / "runs", "--results-dir", folder / "results"),
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(command, name):
    status, out, _ = command(name, "--help")
    assert status == 0
    assert name in out
    assert "--runs-dir" in out or "--results-dir" in out


def test_the_same_command_twice_trains_nothing_and_changes_no_byte(tmp_path, command, stand_ins):
    arguments = options(tmp_path, profile_file(tmp_path))
    status, out, _ = command("reproduce-table", *arguments)
    assert status == 0
    assert "5 runs: 5 done" in out
    assert "SAM+PoF − SAM" in out
    results = tmp_path / "results"
    first = files_of(results)
    assert {"tiny/errors.csv", "tiny/README.md", "tiny/plan.json"} <= set(first)
    tries = (tmp_path / "runs" / "tries").read_text()
    status, again, _ = command("reproduce-table", *arguments)
    assert status == 0
    assert "RUNNING" not in again
    assert again.partition("5 runs")[2] == out.partition("5 runs")[2]
    assert (tmp_path / "runs" / "tries").read_text() == tries
    assert files_of(results) == first
    # The committed records alone are enough to rebuild the tables.
    for name in ("errors.csv", "README.md"):
        (results / "tiny" / name).unlink()
    status, _, _ = command("report", "--profile", "tiny", "--results-dir", results)
    assert status == 0
    assert files_of(results) == first


def test_a_failure_is_shown_everywhere_and_retried_on_request_alone(tmp_path, command, stand_ins):
    profile = profile_file(tmp_path)
    failing = "digits wrn_10_1 none sam epochs 0–2 seed 0"
    blocked = "digits wrn_10_1 none sam+pof epochs 2–3 seed 0"
    stand_ins({failing: ["fail"]})
    status, out, _ = command("reproduce-table", *options(tmp_path, profile))
    assert status == 1
    assert f"FAILED      {failing}: a reason" in out
    page = (tmp_path / "results" / "tiny" / "README.md").read_text()
    assert f"- FAILED: {failing}: a reason" in page
    assert f"- BLOCKED: {blocked}" in page
    status, out, _ = command("reproduce-table", *options(tmp_path, profile))
    assert status == 1
    assert "1 runs had failed before and were not tried again (--retry-failed)" in out
    status, out, _ = command("reproduce-table", *options(tmp_path, profile), "--retry-failed")
    assert status == 0
    assert "Missing" not in (tmp_path / "results" / "tiny" / "README.md").read_text()
    status, out, _ = command("status", "--profile", profile, "--runs-dir", tmp_path / "runs")
    assert status == 0
    assert "5 runs: 5 done" in out


def test_data_that_cannot_be_had_leave_their_rows_and_stop_nobody(
    tmp_path, command, stand_ins, monkeypatch
):
    original = assembly.data.load

    def offline(name, folder, **more):
        if name == "digits":
            return original(name, folder, **more)
        raise DataUnavailable(f"{name}: no source has it; put it into {folder}")

    monkeypatch.setattr(assembly.data, "load", offline)
    profile = profile_file(tmp_path, {"datasets": ["cifar10", "digits"]})
    status, out, _ = command("reproduce-table", *options(tmp_path, profile))
    assert "cifar10: UNAVAILABLE: cifar10: no source has it" in out
    assert "5 runs: 5 done" in out
    assert status == 0
    page = (tmp_path / "results" / "tiny" / "README.md").read_text()
    assert f"- UNAVAILABLE: cifar10: cifar10: no source has it; put it into {tmp_path}" in page
    csv = (tmp_path / "results" / "tiny" / "errors.csv").read_text().splitlines()
    assert len([line for line in csv if line.startswith("cifar10,") and ",0,1,," in line]) == 3
    assert len([line for line in csv if line.startswith("digits,") and ",1,1,5.0" in line]) == 3


def test_a_users_mistakes_are_one_line(tmp_path, command):
    profile = profile_file(tmp_path)
    file = tmp_path / "file"
    file.write_text("")

    def mistake(*arguments):
        status, _, err = command(*arguments)
        assert status == 1
        (line,) = err.strip().splitlines()
        assert line.startswith("error: ")
        return line

    sweep = ("reproduce-table", *options(tmp_path, profile))
    assert "no profile 'absent'" in mistake("reproduce-table", "--profile", "absent")
    assert "device 'tpu' cannot be used" in mistake(*sweep, "--device", "tpu")
    at_once = ("--executor", "slurm", "--seeds-at-once", "2")
    assert "runs_per_gpu" in mistake(*sweep, *at_once)
    assert f"{file}/plans/tiny.json: cannot be written" in mistake(*sweep, "--runs-dir", file)
    kept = tmp_path / "results" / "tiny" / "runs"
    assert "runs cannot be kept where" in mistake(*sweep, "--runs-dir", kept)
    unknown = profile_file(tmp_path, {"backbones": ["resnet_of_mine"]}, name="unknown")
    assert "resnet_of_mine" in mistake("reproduce-table", *options(tmp_path, unknown))
    greedy = profile_file(tmp_path, {"data": {"train_size": 5000}}, name="greedy")
    assert "exceed its 1442 training images" in mistake(
        "reproduce-table", *options(tmp_path, greedy)
    )
    nothing = mistake("report", "--profile", profile, "--results-dir", tmp_path / "absent")
    assert "no results here yet" in nothing
    assert not (tmp_path / "results").exists()


def test_a_wrong_option_is_explained(command):
    status, _, err = command("reproduce-table", "--jobs", "-1")
    assert status == 2
    assert "--jobs" in err


def test_status_before_anything_was_run(tmp_path, command):
    status, out, _ = command("status", "--profile", "smoke", "--runs-dir", tmp_path / "runs")
    assert status == 0
    assert "nothing has been run yet" in out
    assert not (tmp_path / "runs").exists()


def test_status_report_and_help_load_no_pytorch(tmp_path, command, stand_ins, monkeypatch):
    profile = profile_file(tmp_path)
    command("reproduce-table", *options(tmp_path, profile))
    monkeypatch.undo()
    program = (
        "import sys; from benchmarks import cli\n"
        "for arguments in eval(sys.argv[1]):\n"
        "    sys.argv = ['benchmarks', *arguments]\n"
        "    try: cli.main()\n"
        "    except SystemExit as end: assert not end.code, arguments\n"
        "print('torch' in sys.modules, 'timm' in sys.modules)"
    )
    name = str(profile)
    commands = [
        ["--help"],
        ["reproduce-table", "--help"],
        ["status", "--profile", name, "--runs-dir", str(tmp_path / "runs")],
        ["report", "--profile", name, "--results-dir", str(tmp_path / "results")],
    ]
    done = subprocess.run(
        [sys.executable, "-c", program, repr(commands)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "5 runs: 5 done" in done.stdout
    assert "| SAM+PoF" in done.stdout
    assert done.stdout.splitlines()[-1] == "False False"


def test_the_method_alone_is_packaged():
    import tomllib

    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = setuptools.find_packages(str(ROOT), **tool["packages"]["find"])
    assert "pof" in found
    assert "pof.data" in found
    assert {name.partition(".")[0] for name in found} == {"pof"}


# Whole sweeps in processes of their own

# Twenty steps an epoch: long enough to be interrupted in.
SLOW = {"data": {"train_size": 200}, "training": {"batch_size": 10}}


class Launch:
    """``reproduce-table`` as a user starts it, in a process group of its own."""

    def __init__(self, folder, profile, number=0):
        self.store = Store(folder / "runs")
        self.plan_file = self.store.root / "plans" / "tiny.json"
        self.log = folder / f"log-{number}"
        self.arguments = [str(a) for a in (*options(folder, profile), "--jobs", 1)]
        self.child = fork(self._main)

    def _main(self):
        os.setsid()
        # As in the foreground of a terminal, wherever the tests themselves run.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stdout = sys.stderr = self.log.open("w", buffering=1)
        os.dup2(sys.stdout.fileno(), 2)
        os.sched_getaffinity = lambda _: {0}  # one thread a worker: bits can be compared
        os.environ["POF_CHECKPOINT_SECONDS"] = "0"
        sys.argv = ["benchmarks", "reproduce-table", *self.arguments]
        try:
            cli.main()
        except SystemExit as end:
            os._exit(end.code or 0)

    def kill(self):
        os.kill(self.child, signal.SIGKILL)
        assert self.end()[0] == -signal.SIGKILL

    def end(self):
        """Wait for the end; returns exit status and output."""
        status = exit_status(self.child)
        out = self.log.read_text()
        assert "Traceback" not in out
        return status, out

    def states(self):
        """The states that runs are in."""
        return set(self.store.states(planning.read(self.plan_file)).values())

    def at_work(self):
        """The process id of a worker that is past some steps of a run, if there is one."""
        for checkpoints in self.store.root.glob("*/checkpoints"):
            folder = RunFolder(checkpoints.parent)
            pid = folder.progress().get("pid")
            if folder.state() is State.RUNNING and _alive(pid):
                return pid
        return None


def _alive(pid):
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, TypeError):
        return False
    return True


def test_two_sweeps_at_the_same_time_share_the_work_and_end_with_the_same_table(
    tmp_path, stand_ins
):
    stand_ins({"digits wrn_10_1 none sam epochs 0–2 seed 0": ["hold"]})
    profile = profile_file(tmp_path)
    launches = [Launch(tmp_path, profile, number) for number in (1, 2)]
    ends = [launch.end() for launch in launches]
    assert [status for status, _ in ends] == [0, 0]
    tables = [out.partition("5 runs: 5 done")[2] for _, out in ends]
    assert tables[0] == tables[1] != ""
    plan = planning.read(launches[0].plan_file)
    tries = (tmp_path / "runs" / "tries").read_text().splitlines()
    assert sorted(tries) == sorted(run.label for run in plan.runs)


def test_a_sweep_interrupted_in_every_way_ends_as_if_it_never_was(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    profile = profile_file(tmp_path, SLOW)

    # Ctrl-C, which a terminal sends to the whole group.
    launch = Launch(tmp_path, profile)
    wait_until(launch.at_work)
    os.killpg(launch.child, signal.SIGINT)
    status, out = launch.end()
    assert status == 130
    assert "the same command continues" in out
    assert State.INTERRUPTED in launch.states()
    assert launch.states() <= {State.INTERRUPTED, State.PENDING, State.DONE}

    # The launcher is killed: its worker notices and leaves.
    launch = Launch(tmp_path, profile)
    wait_until(launch.at_work)
    launch.kill()
    wait_until(lambda: State.RUNNING not in launch.states())
    assert launch.states() != {State.DONE}

    # A worker is killed: its run is tried again, and the sweep goes on to its end.
    launch = Launch(tmp_path, profile)
    wait_until(launch.at_work)
    os.kill(launch.at_work(), signal.SIGKILL)
    status, out = launch.end()
    assert status == 0
    assert "INTERRUPTED" in out
    assert launch.states() == {State.DONE}

    # The same sweep without any of it.
    plan, smooth = planning.read(launch.plan_file), Store(tmp_path / "smooth")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    worker = Worker(smooth, plan, tmp_path, device=torch.device("cpu"))
    for run in plan.runs:
        assert worker.carry_out(run) == (Ending.DONE, "")
        assert record(launch.store, run) == record(smooth, run)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
