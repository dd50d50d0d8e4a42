"""One run carried out: resumed bit for bit, damage survived, failures on record."""

import errno
import json
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import assembly, checkpoint
from benchmarks.errors import UserError
from benchmarks.store import State, Store
from benchmarks.worker import Ending, Worker
from pof.data.official import DIGITS_FINGERPRINT
from tests import harness
from tests.harness import fork, make_plan, record, wait_until

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before[0])
    torch.use_deterministic_algorithms(before[1])


def real_plan(folder, changes=None):
    return make_plan(folder, changes, fingerprints={"digits": DIGITS_FINGERPRINT})


def worker(store, plan, **options):
    return Worker(store, plan, store.root / "data", device=CPU, **options)


def run_of(plan, algorithm, first_epoch=0):
    (run,) = [
        run
        for run in plan.runs
        if (run.settings.algorithm, run.settings.first_epoch) == (algorithm, first_epoch)
    ]
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole sweep, never interrupted: its plan and its store."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("finished")
    plan, store = real_plan(folder), Store(folder / "runs")
    at_work = worker(store, plan)
    for run in plan.runs:
        assert at_work.carry_out(run) == (Ending.DONE, "")
    return plan, store


def with_parent_of(run, finished, root):
    """A store that holds the run's finished parent, if it has one."""
    plan, store = finished
    mine = Store(root)
    if run.parent:
        parent = plan.by_identity()[run.parent]
        shutil.copytree(store.folder(parent).path, mine.folder(parent).path)
    return mine


METHODS = [("sgd", 0), ("sam", 0), ("pof", 2)]


def test_the_record_of_an_epoch_is_complete(finished):
    plan, store = finished
    for algorithm, first in METHODS:
        run = run_of(plan, algorithm, first)
        epochs = store.folder(run).metrics()
        assert [e["epoch"] for e in epochs] == list(range(first + 1, run.settings.last_epoch + 1))
        wanted = {"train_loss", "train_error", "test_loss", "test_error", "learning_rate"}
        wanted |= {"images_per_second"}
        if algorithm == "pof":
            wanted |= {"xi_median", "xi_max", "cosine", "feature_norm", "capped_share"}
            assert store.folder(run).result()["runaway"] in (True, False)
        for epoch in epochs:
            assert wanted <= epoch.keys()
            assert epoch["images_per_second"] > 0
            count = 355 * epoch["test_error"] / 100  # of the digits' 355 test images
            assert count == pytest.approx(round(count), abs=1e-9)


def test_only_the_final_checkpoint_stays_and_its_hash_is_on_record(finished):
    plan, store = finished
    for run in plan.runs:
        folder = store.folder(run)
        (path,) = folder.checkpoints.iterdir()
        assert path.stem.endswith(folder.result()["checkpoint_sha256"])


def test_a_child_starts_from_its_parents_final_checkpoint_with_its_classifier(finished):
    plan, store = finished
    child = run_of(plan, "pof", 2)
    parent = run_of(plan, "sam", 0)
    result = store.folder(child).result()
    parent_result = store.folder(parent).result()
    assert result["parent"] == {
        "identity": parent.identity,
        "checkpoint_sha256": parent_result["checkpoint_sha256"],
    }
    # θ₀ is never changed by PoF; φ is.
    assert result["classifier_sha256"] == parent_result["classifier_sha256"]
    assert result["weights_sha256"] != parent_result["weights_sha256"]
    weights = [
        checkpoint.load_newest(store.folder(run).checkpoints).state["trainer"]["network"]
        for run in (parent, child)
    ]
    for name, tensor in weights[0].items():
        if name.startswith("classifier"):
            assert torch.equal(tensor, weights[1][name])
    assert any(not torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_two_stages_of_one_method_are_one_training_bit_for_bit(finished, tmp_path):
    plan, store = finished
    whole = real_plan(tmp_path, {"methods": ["sam"], "training": {"epochs": 3, "post_epochs": 0}})
    (run,) = whole.runs
    mine = Store(tmp_path / "runs")
    assert worker(mine, whole).carry_out(run)[0] is Ending.DONE
    continued = store.folder(run_of(plan, "sam", 2)).result()
    assert mine.folder(run).result()["weights_sha256"] == continued["weights_sha256"]


@pytest.mark.parametrize(("algorithm", "first"), METHODS)
def test_killed_at_any_moment_and_started_again_it_ends_in_the_same_bits(
    finished, tmp_path, monkeypatch, algorithm, first
):
    plan, store = finished
    run = run_of(plan, algorithm, first)
    mine = with_parent_of(run, finished, tmp_path)
    folder = mine.folder(run)
    chance = random.Random(algorithm)

    def train():
        ending, _ = worker(mine, plan, checkpoint_seconds=0.0).carry_out(run)
        assert ending is Ending.DONE

    def train_and_die_soon():
        # A checkpoint goes with every step: live to see some, then die at no chosen instruction.
        left, save = iter(range(chance.randrange(1, 3))), checkpoint.save

        def count(*arguments, **options):
            if next(left, None) is None:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the process ends, on the spot
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-5, 5e-3))
            return save(*arguments, **options)

        monkeypatch.setattr(checkpoint, "save", count)
        train()

    starts = 0
    while starts < 4 and folder.state() is not State.DONE:
        harness.exit_status(fork(train_and_die_soon))
        starts += 1
        chance.random()  # drawn in the child, unseen here: the next one is to differ
    assert starts >= 2
    assert harness.exit_status(fork(train)) == 0
    assert record(mine, run) == record(store, run)
    assert folder.result()["starts"] >= 2
    assert not [p for p in folder.path.rglob("*") if p.name.startswith(".")]


NASTY = {
    # The moment → (what is called there, the how-manieth call is the process's last).
    "between the record of an epoch and the checkpoint": ("append_metrics", 1),
    "between the draft of a checkpoint and its name": ("replace", 2),
    "after the final checkpoint, before the result": ("write_result", 0),
}


@pytest.mark.parametrize("moment", NASTY)
def test_killed_at_the_nastiest_moments(finished, tmp_path, monkeypatch, moment):
    plan, store = finished
    run = run_of(plan, "sam", 0)
    mine = Store(tmp_path)
    folder = mine.folder(run)
    name, calls = NASTY[moment]

    def train_and_die():
        owner = Path if name == "replace" else type(folder)
        original = getattr(owner, name)
        left = iter(range(calls))

        def last(self, *arguments, **options):
            if name == "replace" and Path(*arguments).suffix != ".pt":
                return original(self, *arguments, **options)
            if name == "append_metrics":
                original(self, *arguments, **options)
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return None if name == "append_metrics" else original(self, *arguments, **options)

        setattr(owner, name, last)
        worker(mine, plan, checkpoint_seconds=0.0).carry_out(run)

    for _ in range(3):  # every time again
        assert harness.exit_status(fork(train_and_die)) == -signal.SIGKILL
        assert folder.state() is State.INTERRUPTED
        drafts = [p for p in folder.path.rglob("*") if p.name.startswith(".")]
        assert len(drafts) <= 1
        if name == "append_metrics":
            break  # each epoch's only once
    assert worker(mine, plan).carry_out(run) == (Ending.DONE, "")
    assert record(mine, run) == record(store, run)
    (path,) = folder.checkpoints.iterdir()
    assert path.stem.endswith(folder.result()["checkpoint_sha256"])


@pytest.mark.parametrize(("algorithm", "first"), METHODS)
def test_stopped_at_random_steps_it_ends_in_the_same_bits(finished, tmp_path, algorithm, first):
    plan, store = finished
    run = run_of(plan, algorithm, first)
    mine = with_parent_of(run, finished, tmp_path)
    chance = random.Random(7)
    endings = []
    while not endings or endings[-1] is not Ending.DONE:
        asked = iter(range(chance.randrange(1, 6)))
        stopping = worker(mine, plan, should_stop=lambda a=asked: next(a, None) is None)
        endings.append(stopping.carry_out(run)[0])
        assert len(endings) < 30
    assert endings.count(Ending.INTERRUPTED) == len(endings) - 1 >= 1
    assert record(mine, run) == record(store, run)
    assert mine.folder(run).result()["starts"] == len(endings)


def interrupted(plan, run, mine, steps=8):
    """Leave a run interrupted after some steps, two checkpoints behind it."""
    asked = iter(range(steps))
    stopping = worker(
        mine, plan, should_stop=lambda: next(asked, None) is None, checkpoint_seconds=0.0
    )
    assert stopping.carry_out(run)[0] is Ending.INTERRUPTED
    found = sorted(mine.folder(run).checkpoints.iterdir())
    assert len(found) == 2
    return found


def test_a_checkpoint_cut_in_half_is_detected_and_the_one_before_serves(finished, tmp_path):
    plan, store = finished
    run = run_of(plan, "sam", 0)
    mine = Store(tmp_path)
    older, newest = interrupted(plan, run, mine)
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    assert worker(mine, plan).carry_out(run) == (Ending.DONE, "")
    assert record(mine, run) == record(store, run)
    result = mine.folder(run).result()
    assert [w for w in result["warnings"] if str(newest) in w and "damaged" in w]
    assert "started over" not in "".join(result["warnings"])
    assert result["starts"] == 2
    assert not older.exists()


def test_with_no_whole_checkpoint_the_run_starts_over_and_says_so(finished, tmp_path):
    plan, store = finished
    run = run_of(plan, "sam", 0)
    mine = Store(tmp_path)
    for path in interrupted(plan, run, mine):
        path.write_bytes(b"tampered")
    assert worker(mine, plan).carry_out(run) == (Ending.DONE, "")
    assert record(mine, run) == record(store, run)
    assert "no usable checkpoint: started over" in mine.folder(run).result()["warnings"]


def test_a_run_whose_record_lost_epochs_starts_over_and_says_so(finished, tmp_path):
    plan, store = finished
    run = run_of(plan, "sam", 0)
    mine = Store(tmp_path)
    interrupted(plan, run, mine)
    (mine.folder(run).path / "metrics.jsonl").unlink()
    assert worker(mine, plan).carry_out(run) == (Ending.DONE, "")
    assert record(mine, run) == record(store, run)
    assert "metrics.jsonl" in "".join(mine.folder(run).result()["warnings"])


def test_two_processes_on_one_run_train_it_once(finished, tmp_path):
    plan, store = finished
    run = run_of(plan, "sam", 0)
    mine = Store(tmp_path)
    folder = mine.folder(run)

    go_on = tmp_path / "go-on"

    def wait():
        wait_until(go_on.exists)
        return False

    def train():
        assert worker(mine, plan, should_stop=wait).carry_out(run) == (Ending.DONE, "")

    child = fork(train)
    wait_until(lambda: folder.state() is State.RUNNING)
    ending, reason = worker(mine, plan).carry_out(run)
    go_on.touch()
    assert ending is Ending.BUSY
    assert "another process" in reason
    assert harness.exit_status(child) == 0
    assert record(mine, run) == record(store, run)
    assert folder.result()["starts"] == 1
    # Once it is done, it is not trained again.
    content = harness.files_of(folder.path)
    assert worker(mine, plan).carry_out(run) == (Ending.DONE, "")
    assert harness.files_of(folder.path) == content


def test_a_loss_that_is_not_finite_fails_the_run_with_its_epoch_and_step(tmp_path):
    plan = real_plan(tmp_path, {"methods": ["sam"], "optimizer": {"learning_rate": 1e6}})
    parent, child = plan.runs
    store = Store(tmp_path / "runs")
    at_work = worker(store, plan)
    ending, reason = at_work.carry_out(parent)
    assert ending is Ending.FAILED
    failure = store.folder(parent).failure()
    assert failure["reason"] == reason
    assert "not finite at epoch 0, step " in reason
    assert "Traceback" in failure["traceback"]
    assert "NonFiniteLoss" in failure["traceback"]
    assert store.states(plan) == {parent.identity: State.FAILED, child.identity: State.BLOCKED}
    # It is not tried again by itself, and the same worker goes on with other runs.
    assert at_work.carry_out(parent)[0] is Ending.FAILED


def test_weights_that_blow_up_in_the_very_last_step_are_no_result(tmp_path, monkeypatch):
    plan = real_plan(tmp_path, {"methods": ["sgd"], "training": {"post_epochs": 0}})
    monkeypatch.setattr("benchmarks.worker.evaluate", lambda *_: (float("nan"), 90.0))
    ending, reason = worker(Store(tmp_path / "runs"), plan).carry_out(plan.runs[0])
    assert (ending, reason) == (Ending.FAILED, "the test loss is not finite after epoch 1")


def test_a_retried_run_keeps_its_earlier_failure_on_record(finished, tmp_path):
    plan, store = finished
    run = run_of(plan, "sgd", 0)
    mine = Store(tmp_path)
    folder = mine.folder(run)
    folder.create(run)
    folder.write_failure("the first time", "trace")
    assert worker(mine, plan).carry_out(run)[0] is Ending.FAILED
    folder.retry()
    assert worker(mine, plan).carry_out(run)[0] is Ending.DONE
    assert "earlier attempt failed: the first time" in folder.result()["warnings"]
    assert record(mine, run) == record(store, run)


def test_a_full_disk_stops_the_run_with_one_line_and_with_room_it_continues(
    finished, tmp_path, monkeypatch
):
    plan, store = finished
    run = run_of(plan, "sam", 0)
    mine = Store(tmp_path)
    interrupted(plan, run, mine)
    with monkeypatch.context() as patch:
        original, left = os.fsync, iter([True])

        def full(handle):
            if next(left, False):  # a smaller file may find room again
                raise OSError(errno.ENOSPC, "No space left on device")
            original(handle)

        patch.setattr(os, "fsync", full)
        ending, reason = worker(mine, plan, checkpoint_seconds=0.0).carry_out(run)
    assert ending is Ending.FAILED
    assert "no space left to write; free some and run again" in reason
    assert mine.folder(run).state() is State.INTERRUPTED
    assert worker(mine, plan).carry_out(run) == (Ending.DONE, "")
    assert record(mine, run) == record(store, run)


def test_data_that_changed_since_the_plan_fail_the_run_with_one_line(tmp_path):
    plan = make_plan(tmp_path, fingerprints={"digits": "sha256:" + 64 * "0"})
    store = Store(tmp_path / "runs")
    ending, reason = worker(store, plan).carry_out(plan.runs[0])
    assert ending is Ending.FAILED
    assert reason.startswith("digits: the data changed since the run was planned (sha256:")
    assert store.folder(plan.runs[0]).state() is State.FAILED


def test_a_parents_missing_or_damaged_checkpoint_is_said_with_its_cure(finished, tmp_path):
    plan, _ = finished
    child = run_of(plan, "pof", 2)
    mine = with_parent_of(child, finished, tmp_path)
    parent = mine.folder(run_of(plan, "sam", 0))
    (path,) = parent.checkpoints.iterdir()
    path.write_bytes(b"x")
    ending, reason = worker(mine, plan).carry_out(child)
    assert ending is Ending.FAILED
    assert str(parent.path) in reason
    assert "--retry-failed" in reason


def test_the_sign_of_life_says_where_a_continued_run_stands(finished, tmp_path):
    plan, _ = finished
    run = run_of(plan, "sam", 0)
    mine = Store(tmp_path)
    interrupted(plan, run, mine, steps=8)  # one epoch of six steps, and then some
    shown = []
    folder = mine.folder(run)

    def look():
        shown.append(folder.progress())
        return True

    worker(mine, plan, should_stop=look).carry_out(run)
    assert shown[0]["epoch"] == 1
    assert 0 < shown[0]["step"] < shown[0]["steps"] == 6
    assert shown[0]["latest"]["epoch"] == 1


def test_evaluating_less_often_records_less_and_trains_the_same(finished, tmp_path):
    plan, store = finished
    seldom = real_plan(tmp_path, {"training": {"evaluate_every": 5}})
    run = run_of(seldom, "sgd", 0)
    mine = Store(tmp_path / "runs")
    assert worker(mine, seldom).carry_out(run)[0] is Ending.DONE
    assert ["test_error" in epoch for epoch in mine.folder(run).metrics()] == [False, True]
    same = store.folder(run_of(plan, "sgd", 0)).result()
    assert mine.folder(run).result()["weights_sha256"] == same["weights_sha256"]


def test_the_images_chosen(tmp_path):
    """Subset and held-out part: disjoint, drawn by the subset's seed alone."""
    dataset = assembly.load_dataset("digits", tmp_path)

    def subject(seed, **data):
        changes = {"methods": ["sgd"], "seeds": [seed], "data": data}
        run = real_plan(tmp_path, changes).runs[0]
        return assembly.prepare_subject(run.settings, dataset, CPU)

    def rows(images):
        return {image.tobytes() for image in np.asarray(images)}

    some = subject(0, train_size=100, holdout=50)
    assert (len(some.train_labels), len(some.test_labels)) == (100, 50)
    assert torch.equal(some.train_images, subject(1, train_size=100, holdout=50).train_images)
    other = subject(0, train_size=100, holdout=50, subset_seed=1)
    assert not torch.equal(some.train_images, other.train_images)
    more = subject(0, train_size=200, holdout=50)
    assert torch.equal(more.train_images[:100], some.train_images)
    assert torch.equal(more.test_images, some.test_images)
    train = rows(dataset.train.images)
    assert rows(some.test_images) <= train
    assert not rows(some.test_images) & rows(some.train_images)
    everything = subject(0, train_size=None)
    assert torch.equal(everything.train_images, dataset.train.images)
    assert torch.equal(everything.test_images, dataset.test.images)
    for impossible in ({"train_size": 1443}, {"train_size": 1442, "holdout": 1}, {"holdout": 1442}):
        with pytest.raises(UserError, match="exceed its 1442 training images"):
            subject(0, **{"train_size": None, **impossible})


def test_initial_weights_depend_on_the_seed_alone(tmp_path):
    dataset = assembly.load_dataset("digits", tmp_path)

    def first_weights(changes):
        run = real_plan(tmp_path, {"methods": ["sgd"]} | changes).runs[0]
        network = assembly.build_network(run.settings, dataset.info, CPU)
        return torch.cat([p.flatten() for p in network.parameters()])

    start = first_weights({})
    assert torch.equal(start, first_weights({"methods": ["sam"]}))
    assert torch.equal(start, first_weights({"optimizer": {"learning_rate": 0.5}}))
    assert not torch.equal(start, first_weights({"seeds": [1]}))


def test_the_environment_is_on_record(finished):
    plan, store = finished
    text = (store.folder(plan.runs[0]).path / "environment.json").read_text()
    (segment,) = json.loads(text)["segments"]
    environment = segment["environment"]
    assert environment["packages"]["torch"] == torch.__version__.partition("+")[0] or (
        environment["packages"]["torch"] == torch.__version__
    )
    assert environment["threads"] == 1
    assert environment["code"].keys() == {"revision", "dirty"}
