"""One trouble at a time: limits, nodes, full disks, failed parents, large sweeps."""

import os
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

from benchmarks import checkpoint
from benchmarks.files import read_json
from benchmarks.run import Run
from benchmarks.store import State
from slurm.loopback import Cluster, ClusterError
from tests.harness import make_plan, wait_until
from tests.slurm.conftest import PATIENCE, Lab, Launched, made_up, parent_of, results_of

SINGLE = {
    "methods": ["sam"],
    "training": {"epochs": 20, "post_epochs": 0, "batch_size": 10},
    "schedule": {"milestones": [15]},
}


def single_run(lab: Lab, **cluster) -> tuple[Launched, Run]:
    """A sweep of one run, submitted."""
    lab.profile(SINGLE)
    lab.cluster_file(**cluster)
    launcher = lab.reproduce()
    launcher.wait_for("submitted to Slurm")
    (run,) = lab.plan().runs
    return launcher, run


@pytest.fixture(scope="module")
def reference(tmp_path_factory, cluster):
    """The same by the local executor."""
    lab = Lab(tmp_path_factory.mktemp("reference"), cluster)
    lab.profile(SINGLE)
    lab.finish("reproduce-table", "--jobs", 2)  # a thread each, as in the jobs
    return lab


def assert_trained_once(lab: Lab, reference: Lab) -> None:
    """The table, the weights and every epoch are the local executor's, each epoch once."""
    assert results_of(lab) == results_of(reference)
    assert lab.table() == reference.table()
    (run,) = lab.plan().runs
    assert [line["epoch"] for line in lab.folder_of(run).metrics()] == list(range(1, 21))


def test_a_stage_longer_than_the_time_limit_is_chained(lab, reference):
    """Slurm's shortest limit is a minute, and it tells of its end 10 to 40 seconds early."""
    shortest = {"time_limit": "1", "signal_seconds": 10}
    launcher, run = single_run(lab, resources=shortest, retries={"idle": 20})
    (held,) = lab.hold(run)
    lab.release_when_told(held)
    assert launcher.wait() == 0, launcher.said
    assert set(lab.causes(run)) == {"timed out", "done"}
    assert lab.folder_of(run).result()["starts"] >= 2
    assert lab.calls()["sbatch"] == 1
    assert_trained_once(lab, reference)


def test_slurmd_dies_and_the_run_is_given_to_another_node(lab, reference):
    """The old process trains on all the same: the new one must wait for it."""
    launcher, run = single_run(lab)
    (held,) = lab.hold(run)
    node = lab.node_of(run)
    lab.cluster.stop(node, signal.SIGKILL)
    wait_until(lambda: lab.restarts_of(run) == 1, PATIENCE)
    wait_until(lambda: lab.state_of_job(run) == "RUNNING", PATIENCE)
    assert lab.node_of(run) != node
    os.kill(held, signal.SIGCONT)
    assert launcher.wait() == 0, launcher.said
    assert lab.folder_of(run).result()["starts"] == 1
    assert_trained_once(lab, reference)
    lab.cluster.start(node)
    wait_until(lambda: nodes_are_idle(lab), PATIENCE)


def test_a_node_dies_and_comes_back(lab, reference):
    launcher, run = single_run(lab)
    (worker,) = lab.hold(run)
    node, task = lab.node_of(run), parent_of(worker)
    lab.cluster.stop(node, signal.SIGKILL)
    for pid in (parent_of(task), task, worker):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: "down" in lab.cluster.command("sinfo", "-h", "-n", node, "-o", "%t"))
    lab.cluster.start(node)
    assert launcher.wait() == 0, launcher.said
    assert lab.causes(run) == ["node failed", "done"]
    assert_trained_once(lab, reference)
    wait_until(lambda: nodes_are_idle(lab), PATIENCE)


def nodes_are_idle(lab: Lab) -> bool:
    states = lab.cluster.command("sinfo", "-h", "-p", "main", "-N", "-o", "%t").split()
    return set(states) == {"idle"}


@pytest.mark.parametrize(("accounts", "cause"), [(True, "crashed"), (False, "node failed")])
def test_a_job_that_the_queue_has_forgotten(lab, reference, accounts, cause):
    """Then the accounts are asked; if they fail too, the run is tried again all the same."""
    lab.forget_ended_jobs()
    if not accounts:
        lab.break_command("sacct")
    launcher, run = single_run(lab)
    (held,) = lab.hold(run)
    os.kill(parent_of(held), signal.SIGKILL)
    os.kill(held, signal.SIGCONT)
    assert launcher.wait() == 0, launcher.said
    assert lab.causes(run) == [cause, "done"]
    assert lab.calls()["sacct"] == 1
    assert lab.calls()["sbatch"] == 2
    assert_trained_once(lab, reference)


def test_without_accounting_a_failed_parent_blocks_its_children(tmp_path):
    changes = {"methods": ["sgd", "sam", "sam+pof"], "sam": {"rho": 1e30}}
    with tempfile.TemporaryDirectory(prefix="pof-slurm-") as folder:
        cluster = Cluster(Path(folder), accounting=False)
        cluster.up()
        try:
            with pytest.raises(ClusterError, match="accounting storage is disabled"):
                cluster.command("sacct")
            lab = Lab(tmp_path, cluster)
            lab.profile(changes)
            lab.cluster_file()
            launcher = lab.reproduce()
            assert launcher.wait() == 1, launcher.said
            lab.close()
        finally:
            cluster.down()
    assert launcher.said.count("\nBLOCKED ") == 2
    assert launcher.said.count("\nFAILED ") == 1
    assert lab.folder_of(lab.run("sgd", 2)).state() is State.DONE
    assert lab.folder_of(lab.run("sam", 0)).state() is State.FAILED
    assert lab.folder_of(lab.run("sam+pof", 2)).state() is State.PENDING
    page = (lab.results / "tiny" / "README.md").read_text()
    for method in ("sam", "sam+pof"):
        assert f"BLOCKED: {lab.run(method, 2).label}" in page


@pytest.mark.skipif(
    os.geteuid() != 0 and "CI" not in os.environ, reason="mounting a small file system needs root"
)
def test_a_full_disk_is_a_failure_that_resubmit_mends(lab, reference):
    lab.runs_dir.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(lab.runs_dir)], check=True
    )
    try:
        launcher, run = single_run(lab, environment={"POF_CHECKPOINT_SECONDS": "0"})
        assert launcher.wait() == 1, launcher.said
        folder = lab.folder_of(run)
        assert "no space left" in folder.failure()["reason"]
        assert "no space left" in launcher.said
        for path in folder.path.rglob("*"):
            if path.suffix == ".pt":
                checkpoint.load(path)
            elif path.suffix == ".json":
                read_json(path)
            assert not path.name.startswith(".")
        subprocess.run(["mount", "-o", "remount,size=100m", str(lab.runs_dir)], check=True)
        lab.finish("resubmit", "--cluster", lab.folder / "cluster.toml")
        assert_trained_once(lab, reference)
    finally:
        lab.close()
        subprocess.run(["umount", "--lazy", str(lab.runs_dir)], check=True)


def test_cancel_ends_a_sweep_that_the_same_command_continues(lab):
    """The launcher looks on: while a parent is still ending, its children stay cancelled."""
    lab.profile({"methods": ["sam", "sam+pof"], "training": {"epochs": 20, "batch_size": 10}})
    lab.cluster_file()
    launcher = lab.reproduce()
    launcher.wait_for("submitted to Slurm")
    parent, *children = lab.plan().runs
    (held,) = lab.hold(parent)
    assert lab.finish("cancel").startswith("cancelled 3 jobs: ")
    lab.release_when_told(held)
    assert launcher.wait() == 1, launcher.said
    assert lab.calls()["sbatch"] == 3
    assert lab.folder_of(parent).state() is State.INTERRUPTED
    again = lab.reproduce()
    assert again.wait() == 0, again.said
    assert lab.calls()["sbatch"] == 6
    assert lab.folder_of(parent).result()["starts"] == 2
    for run in (parent, *children):
        epochs = [line["epoch"] for line in lab.folder_of(run).metrics()]
        assert epochs == list(range(run.settings.first_epoch + 1, run.settings.last_epoch + 1))


def test_five_hundred_runs_take_few_calls_and_cancel_spares_the_others(lab, monkeypatch):
    """A stage that does nothing: submitted, watched and cancelled."""
    theirs = lab.cluster.command(
        "sbatch", "--parsable", "--hold", "-o", "/dev/null", "--wrap", "true"
    )
    plan = make_plan(lab.folder, {"seeds": list(range(250)), "methods": ["sgd"]})
    plan.write(lab.runs_dir / "plans" / "tiny.json")
    assert len(plan.runs) == 500
    launcher = made_up(lab, monkeypatch, plan, {}, resources={"memory": "100M"})
    looks = 0

    def some_are_done() -> bool:
        nonlocal looks
        looks += 1
        launcher.step()
        return list(launcher.sweep.states.values()).count(State.DONE) >= 5

    wait_until(some_are_done, PATIENCE)
    calls = lab.calls()
    assert calls["sbatch"] == 2
    assert calls["scontrol"] == 1
    assert calls["sacct"] == 0
    assert calls["squeue"] < looks  # however often it looks
    lab.finish("status")
    assert lab.calls()["squeue"] - calls["squeue"] == 1
    said = lab.finish("cancel")
    assert "cancelled" in said
    assert lab.calls()["squeue"] - calls["squeue"] == 2
    assert lab.calls()["scancel"] - calls["scancel"] == 2  # an array each
    wait_until(
        lambda: lab.cluster.command("squeue", "-h", "-o", "%i") == theirs,
        PATIENCE,
    )
