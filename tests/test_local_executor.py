"""The local executor's decisions, with workers that stand in for training."""

import json
import os
import signal
import sys

import pytest
from rich.console import Console

from benchmarks import display
from benchmarks.executors import local
from benchmarks.store import State, Store
from tests import harness
from tests.harness import ROOT, finish, fork, make_plan, wait_until


class Sweeps:
    """A plan and how to execute it with stand-ins."""

    def __init__(self, folder, changes=None):
        self.plan = make_plan(folder, changes)
        self.store = Store(folder / "runs")
        self.plan_file = folder / "runs" / "plan.json"
        self.plan.write(self.plan_file)
        self.orders = folder / "orders.json"
        self.history = []

    def labelled(self, text):
        """The one run whose label contains the words."""
        (run,) = [run for run in self.plan.runs if text in run.label]
        return run

    def execute(self, orders=None, *, jobs=2, observe=None, seeds_at_once=1):
        named = {self.labelled(text).label: what for text, what in (orders or {}).items()}
        self.orders.write_text(json.dumps(named))
        options = local.Options(
            runs_dir=self.store.root,
            plan_file=self.plan_file,
            data_dir=self.store.root,
            jobs=jobs,
            device="cpu",
            seeds_at_once=seeds_at_once,
        )

        def follow(sweep, run):
            if run is not None:
                self.history.append((run.label, sweep.states[run.identity]))
            if observe is not None:
                observe(sweep, run)

        return local.execute(self.plan, options, follow)

    def tries(self, text):
        """How often a run was handed to a worker."""
        lines = (self.store.root / "tries").read_text().splitlines()
        return lines.count(self.labelled(text).label)


@pytest.fixture
def sweeps(tmp_path, monkeypatch):
    launcher = tmp_path / "python"
    launcher.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tests.fake_worker "$@"\n')
    launcher.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(launcher))
    monkeypatch.setenv("FAKE_ORDERS", str(tmp_path / "orders.json"))
    monkeypatch.chdir(ROOT)
    return lambda changes=None: Sweeps(tmp_path, changes)


SAM, SAM_ON = "sam epochs 0–2", "sam epochs 2–3"
POF = "sam+pof epochs 2–3"
SGD, SGD_ON = "sgd epochs 0–2", "sgd epochs 2–3"


def by_label(sweep):
    return {run.label: sweep.states[run.identity] for run in sweep.plan.runs}


def test_every_run_is_carried_out_once_parents_first_and_never_again(sweeps):
    made = sweeps({"seeds": [0, 1]})
    sweep = made.execute()
    assert set(sweep.states.values()) == {State.DONE}
    tries = (made.store.root / "tries").read_text().splitlines()
    assert sorted(tries) == sorted(run.label for run in made.plan.runs)
    done = [label for label, state in made.history if state is State.DONE]
    started = [label for label, state in made.history if state is State.RUNNING]
    for run in made.plan.runs:
        if run.parent:
            parent = made.plan.by_identity()[run.parent].label
            assert made.history.index((parent, State.DONE)) < made.history.index(
                (run.label, State.RUNNING)
            )
    # The longest chain first: SAM costs the most.
    assert all(" sam " in label for label in started[:2])
    assert len(done) == len(made.plan.runs)
    made.history.clear()
    again = made.execute()
    assert set(again.states.values()) == {State.DONE}
    assert made.history == []
    assert (made.store.root / "tries").read_text().splitlines() == tries


def test_seeds_given_to_a_worker_at_once_that_dies_are_tried_again_and_differ_in_the_seed(sweeps):
    made = sweeps({"seeds": [0, 1, 2]})
    given = []

    def observe(sweep, run):
        if run is not None and sweep.states[run.identity] is State.RUNNING:
            given.append(run)

    first = "sam epochs 0–2 seed 1"
    sweep = made.execute({first: ["crash"]}, jobs=1, observe=observe, seeds_at_once=2)
    assert set(sweep.states.values()) == {State.DONE}
    assert made.tries(first) == 2
    assert [run.settings.seed for run in given[:2]] == [0, 1]
    assert given[0].apart_from_seed == given[1].apart_from_seed
    assert len({run.apart_from_seed for run in made.plan.runs}) == len(made.plan.runs) / 3


def test_a_failed_run_blocks_its_children_and_nobody_else(sweeps):
    made = sweeps()
    sweep = made.execute({SAM: ["fail"]})
    states = by_label(sweep)
    assert states[made.labelled(SAM).label] is State.FAILED
    assert states[made.labelled(SAM_ON).label] is State.BLOCKED
    assert states[made.labelled(POF).label] is State.BLOCKED
    assert states[made.labelled(SGD_ON).label] is State.DONE
    assert sweep.reasons == {made.labelled(SAM).identity: "a reason"}
    assert made.store.states(made.plan) == sweep.states
    # Failed runs stay failed until they are allowed another try.
    assert by_label(made.execute()) == states
    made.store.folder(made.labelled(SAM)).retry()
    assert set(made.execute().states.values()) == {State.DONE}
    assert made.tries(SAM) == 2


@pytest.mark.parametrize(("order", "how"), [("crash", "SIGKILL"), ("exit", "exited with 3")])
def test_a_crash_costs_a_retry_two_the_run_and_the_others_nothing(sweeps, order, how):
    made = sweeps({"seeds": [0, 1]})
    once, twice = "sgd epochs 0–2 seed 0", "sgd epochs 0–2 seed 1"
    sweep = made.execute({once: [order], twice: [order, order]})
    states = by_label(sweep)
    assert states[made.labelled(once).label] is State.DONE
    assert states[made.labelled(twice).label] is State.FAILED
    assert sorted(state for state in states.values() if state is not State.DONE) == [
        State.BLOCKED,
        State.FAILED,
    ]
    failure = made.store.folder(made.labelled(twice)).failure()
    assert how in failure["reason"]
    assert "2 times" in failure["reason"]
    assert str(made.store.root / "workers.log") in failure["reason"]
    assert (made.tries(once), made.tries(twice)) == (2, 2)


def test_a_worker_asked_to_stop_by_others_costs_its_run_nothing(sweeps):
    made = sweeps()
    sweep = made.execute({SAM: ["stopped", "stopped", "stopped"]}, jobs=1)
    assert set(sweep.states.values()) == {State.DONE}
    assert made.tries(SAM) == 4


def test_runs_that_another_process_trains_are_waited_for(sweeps):
    made = sweeps()
    run = made.labelled(SAM)
    ready, say = os.pipe()
    finish_it = made.store.root / "finish-it"

    def elsewhere():
        with made.store.folder(run).lock():
            os.write(say, b"1")
            wait_until(finish_it.exists)
            finish(made.store, run, 7.0)

    child = fork(elsewhere)
    os.read(ready, 1)

    def observe(sweep, changed):
        others = [r for r in made.plan.runs if r.settings.algorithm == "sgd"]
        if all(sweep.states[r.identity] is State.DONE for r in others):
            finish_it.touch()

    sweep = made.execute(observe=observe)
    assert harness.exit_status(child) == 0
    assert set(sweep.states.values()) == {State.DONE}
    assert made.store.folder(run).result()["test_error"] == 7.0
    assert run.label not in (made.store.root / "tries").read_text().splitlines()
    assert made.tries(POF) == 1


def test_runs_that_another_process_gives_up_are_taken_over(sweeps):
    made = sweeps()
    run = made.labelled(SAM)
    ready, say = os.pipe()

    def elsewhere():
        with made.store.folder(run).lock():
            os.write(say, b"1")
            signal.pause()

    child = fork(elsewhere)
    os.read(ready, 1)

    def observe(sweep, changed):
        if sweep.states[made.labelled(SGD_ON).identity] is State.DONE and not observe.killed:
            observe.killed = True
            os.kill(child, signal.SIGKILL)
            harness.exit_status(child)

    observe.killed = False
    sweep = made.execute(observe=observe)
    assert set(sweep.states.values()) == {State.DONE}
    assert made.tries(SAM) == 1


def test_an_interrupt_ends_the_workers_and_leaves_their_runs_resumable(sweeps):
    made = sweeps()
    waiting = made.labelled(SAM)

    def interrupt(sweep, changed):
        if (
            made.store.folder(waiting).state() is State.RUNNING
            and made.store.folder(waiting).path.joinpath("progress.json").exists()
        ):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made.execute({SAM: ["wait"]}, jobs=1, observe=interrupt)
    assert made.store.folder(waiting).state() is State.INTERRUPTED
    assert set(made.execute().states.values()) == {State.DONE}


def test_cores_are_divided_among_the_workers(sweeps, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    assert local.default_jobs("cpu", 30) == 12
    assert local.default_jobs("cpu", 3) == 3
    assert local.default_jobs("cpu", 0) == 1
    assert local.default_jobs("cuda", 30) == 1
    made = sweeps()
    seen = []
    original = local._WorkerProcess.__init__

    def noted(self, options, threads, log):
        seen.append(threads)
        original(self, options, threads, log)

    monkeypatch.setattr(local._WorkerProcess, "__init__", noted)
    made.execute(jobs=3)
    assert set(seen) == {4}


# What a person sees


def followed(made, console, orders=None):
    with display.Display(console) as shown:
        return made.execute(orders, observe=shown.observe)


def test_without_a_terminal_there_are_plain_lines(sweeps, tmp_path):
    made = sweeps()
    with (tmp_path / "log").open("w") as file:
        followed(made, Console(file=file, width=40), {SAM: ["fail"]})
    lines = (tmp_path / "log").read_text().splitlines()
    assert "\x1b" not in "".join(lines)
    assert f"FAILED      {made.labelled(SAM).label}: a reason" in lines
    assert f"BLOCKED     {made.labelled(POF).label}" in lines
    done = f"DONE        {made.labelled(SGD).label}: test error 5.00%, train loss 0.2500 (2 s)"
    assert done in lines
    for line in lines:
        assert line.partition(" ")[0] in {"RUNNING", "DONE", "FAILED", "BLOCKED"}


def test_status_shows_every_run_whatever_its_folder_holds(sweeps, tmp_path):
    made = sweeps()
    finish(made.store, made.labelled(SGD), 5.0)
    failed = made.store.folder(made.labelled(SAM))
    failed.create(made.labelled(SAM))
    failed.write_failure("[/tmp/x]: no space [left]", "trace")
    begun = made.store.folder(made.labelled(SGD_ON))
    begun.write_progress(
        {
            "epoch": 2,
            "step": 3,
            "steps": 6,
            "images_per_second": 50.0,
            "latest": {"epoch": 2, "train_loss": 0.125},
        }
    )
    console = Console(width=200, record=True, file=(tmp_path / "log").open("w"))
    view, active = display.status_view(made.plan, made.store)
    console.print(view)
    text = console.export_text()
    assert not active
    assert "test error 5.00%" in text
    assert "[/tmp/x]: no space [left]" in text
    # Half of the last epoch of 6 batches of 25 at 50 images/s: 75 images, 1.5 seconds.
    assert "epoch 2.5/3, train loss 0.1250, test error –, 50 images/s, 2 s left" in text
    assert "5 runs: 1 interrupted, 1 done, 1 failed, 2 blocked" in text
    begun.path.joinpath("progress.json").write_text("{")
    display.status_view(made.plan, made.store)


def test_work_done_counts_forward_passes(sweeps):
    made = sweeps()
    states = made.store.states(made.plan)
    assert display.work_done(made.plan, made.store, states) == 0
    finish(made.store, made.labelled(SAM), 5.0)  # 2 epochs of 150 images, 6 passes each
    begun = {"epoch": 2, "step": 3, "steps": 6, "images_per_second": None, "latest": None}
    made.store.folder(made.labelled(POF)).write_progress(begun)  # half an epoch, 4 passes
    states = made.store.states(made.plan)
    assert display.work_done(made.plan, made.store, states) == 2 * 150 * 6 + 0.5 * 150 * 4
