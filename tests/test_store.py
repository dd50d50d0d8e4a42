"""Run folders: states from disk, locks, records that cannot be edited unnoticed, publishing."""

import json
import os
import signal

import pytest

from benchmarks import files
from benchmarks.errors import UserError
from benchmarks.files import CannotWrite
from benchmarks.store import Busy, RunFolder, State, Store
from tests import harness
from tests.harness import files_of, finish, fork, make_plan


@pytest.fixture
def plan(tmp_path):
    return make_plan(tmp_path)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "runs")


def by_algorithm(plan, algorithm, first_epoch):
    (run,) = [
        run
        for run in plan.runs
        if run.settings.algorithm == algorithm and run.settings.first_epoch == first_epoch
    ]
    return run


def test_states_are_read_from_the_folder(store, plan):
    sam, child = by_algorithm(plan, "sam", 0), by_algorithm(plan, "pof", 2)
    folder = store.folder(sam)

    def states():
        found = store.states(plan)
        return found[sam.identity], found[child.identity]

    assert states() == (State.PENDING, State.PENDING)
    with folder.lock():
        folder.create(sam)
        assert states() == (State.RUNNING, State.PENDING)
    assert states() == (State.PENDING, State.PENDING)
    folder.write_progress({"epoch": 0})
    assert states() == (State.INTERRUPTED, State.PENDING)
    folder.write_failure("why", "trace")
    assert states() == (State.FAILED, State.BLOCKED)
    folder.retry()
    assert states() == (State.INTERRUPTED, State.PENDING)
    assert folder.earlier_failures() == ["why"]
    folder.write_failure("again", "trace")
    folder.retry()
    assert folder.earlier_failures() == ["why", "again"]
    finish(store, sam, 1.0)
    assert states() == (State.DONE, State.PENDING)


def test_a_lock_keeps_others_out_and_goes_with_its_process(store, plan):
    folder = store.folder(plan.runs[0])
    ready, say = os.pipe()

    def hold():
        with folder.lock():
            os.write(say, b"1")
            signal.pause()

    child = fork(hold)
    assert os.read(ready, 1) == b"1"
    assert folder.state() is State.RUNNING
    with pytest.raises(Busy, match="another process is training this run"), folder.lock():
        pass
    os.kill(child, signal.SIGKILL)
    assert harness.exit_status(child) == -signal.SIGKILL
    assert folder.state() is State.PENDING
    with folder.lock():
        pass


def test_asking_for_the_state_never_keeps_a_worker_out(store, plan):
    folder = store.folder(plan.runs[0])
    with folder.lock():
        pass

    def ask():
        while True:
            folder.state()

    children = [fork(ask) for _ in range(2)]
    try:
        for _ in range(5):
            with folder.lock():
                pass
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            harness.exit_status(child)


def test_records_of_epochs_to_be_trained_again_are_dropped_and_a_cut_line_with_them(store, plan):
    folder = store.folder(plan.runs[0])
    folder.path.mkdir(parents=True)
    for epoch in (1, 2, 3):
        folder.append_metrics({"epoch": epoch})
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "tr')
    assert [record["epoch"] for record in folder.metrics()] == [1, 2, 3]
    assert folder.keep_metrics(2) == [{"epoch": 1}, {"epoch": 2}]
    folder.append_metrics({"epoch": 3})
    assert [record["epoch"] for record in folder.metrics()] == [1, 2, 3]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"epoch": 1}', "\x00\x00"])
def test_a_broken_sign_of_life_is_none_and_stops_nothing(store, plan, content):
    folder = store.folder(plan.runs[0])
    folder.write_progress({})
    (folder.path / "progress.json").write_text(content)
    assert folder.progress() == {}
    assert folder.state() is State.INTERRUPTED


@pytest.mark.parametrize("edit", [{"test_error": 0.1}, {"digest": "0"}, {"extra": 1}])
def test_an_edited_result_is_refused(store, plan, edit):
    finish(store, plan.runs[0], 5.0)
    folder = store.folder(plan.runs[0])
    assert folder.result()["test_error"] == 5.0
    path = folder.path / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    with pytest.raises(UserError, match=r"result\.json: its digest does not fit"):
        folder.result()


def test_a_run_is_read_back_and_an_edited_or_foreign_one_is_refused(store, plan):
    run = plan.runs[0]
    folder = store.folder(run)
    folder.create(run)
    assert folder.run() == run
    path = folder.path / "config.json"
    content = json.loads(path.read_text())

    def refusal(changed):
        path.write_text(json.dumps(changed))
        with pytest.raises(UserError) as caught:
            folder.run()
        assert str(caught.value).startswith(f"{path}: ")
        return str(caught.value)

    assert "edited" in refusal(content | {"identity": "0" * 64})
    assert "schema version 2" in refusal(content | {"schema": 2})
    assert "seed" in refusal(
        content | {"run": content["run"] | {"settings": content["run"]["settings"] | {"seed": "x"}}}
    )
    refusal({"schema": content["schema"]})


def test_a_run_that_moves_has_a_segment_for_each_machine(tmp_path):
    folder = RunFolder(tmp_path / "run")
    for name, epoch, step in [("a", 0, 0), ("a", 1, 3), ("b", 2, 0), ("b", 2, 5), ("c", 2, 0)]:
        folder.add_environment({"device": name}, epoch=epoch, step=step)
    # The last attempt fell back to epoch 2: what b trained from there on was trained again.
    assert folder.environments() == [{"device": "a"}, {"device": "c"}]


def test_publishing_copies_small_files_of_finished_and_failed_runs_alone(tmp_path, store, plan):
    done, failed, begun = plan.runs[0], plan.runs[1], plan.runs[2]
    finish(store, done, 5.0)
    folder = store.folder(done)
    folder.checkpoints.mkdir()
    (folder.checkpoints / "x.pt").write_bytes(b"large")
    folder.write_progress({})
    with folder.lock():
        pass
    store.folder(failed).create(failed)
    store.folder(failed).write_failure("why", "trace")
    store.folder(begun).create(begun)
    target = Store(tmp_path / "results")
    (target.root / "stale").mkdir(parents=True)
    store.publish(plan, target)
    committed = ("config.json", "environment.json", "metrics.jsonl", "result.json")
    assert set(files_of(target.root)) == {
        *(f"{done.name}/{name}" for name in committed),
        *(f"{failed.name}/{name}" for name in ("config.json", "failure.json")),
    }
    assert target.states(plan)[done.identity] is State.DONE
    assert target.states(plan)[failed.identity] is State.FAILED
    assert not (target.root / "stale").exists()

    first = {p: p.stat().st_mtime_ns for p in target.root.rglob("*")}
    store.publish(plan, target)
    assert {p: p.stat().st_mtime_ns for p in target.root.rglob("*")} == first

    store.folder(failed).retry()
    finish(store, failed, 6.0)
    store.publish(plan, target)
    assert target.states(plan)[failed.identity] is State.DONE
    assert not (target.folder(failed).path / "failure.json").exists()


def test_publishing_an_incomplete_record_or_onto_a_file_is_one_line(tmp_path, store, plan):
    finish(store, plan.runs[0], 5.0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        store.publish(plan, Store(tmp_path / "file" / "runs"))
    (store.folder(plan.runs[0]).path / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: missing"):
        store.publish(plan, Store(tmp_path / "results"))


def test_a_process_killed_while_writing_leaves_the_old_content_and_no_litter(tmp_path, plan):
    folder = RunFolder(tmp_path / "run")
    folder.create(plan.runs[0])
    folder.write_failure("first", "")

    def die_before_the_rename():
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        folder.write_failure("second", "")

    assert harness.exit_status(fork(die_before_the_rename)) == -signal.SIGKILL
    assert folder.failure()["reason"] == "first"
    assert len(list(folder.path.iterdir())) == 3
    folder.create(plan.runs[0])
    assert {path.name for path in folder.path.iterdir()} == {"config.json", "failure.json"}


def test_a_file_size_limit_is_one_line_and_nothing_is_half_written(tmp_path):
    import resource

    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(CannotWrite, match="cannot be written"):
            files.write_bytes(path, b"x" * 2000)

    assert harness.exit_status(fork(write)) == 0
    assert files_of(tmp_path) == {"file": b"old"}


def test_runs_dir_that_is_a_file_is_one_line(tmp_path, plan):
    (tmp_path / "runs").write_text("")
    folder = Store(tmp_path / "runs").folder(plan.runs[0])
    assert folder.state() is State.PENDING
    with pytest.raises(UserError, match="cannot be written"), folder.lock():
        pass
    with pytest.raises(UserError, match="cannot be written"):
        plan.write(tmp_path / "runs" / "plans" / "tiny.json")


def test_one_at_a_time_is_let_into_an_exclusive_section(tmp_path):
    path = tmp_path / "counter"
    path.write_text("0")

    def count():
        for _ in range(50):
            with files.exclusive(tmp_path / "lock"):
                path.write_text(str(int(path.read_text()) + 1))

    children = [fork(count) for _ in range(3)]
    assert [harness.exit_status(child) for child in children] == [0, 0, 0]
    assert path.read_text() == "150"
