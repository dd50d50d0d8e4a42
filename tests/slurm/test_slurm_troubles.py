"""One trouble at a time: limits, nodes, full disks, failed parents, large sweeps."""

import os
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

from benchmarks import checkpoint
from benchmarks.executors.slurm.cluster import load_cluster
from benchmarks.executors.slurm.launcher import Launcher, Options
from benchmarks.executors.slurm.scheduler import Slurm
from benchmarks.files import read_json
from benchmarks.store import State
from slurm.loopback import Cluster, ClusterError
from tests.harness import ROOT, make_plan, wait_until
from tests.slurm.conftest import PATIENCE, Lab, parent_of, results_of


def epochs_of(lab: Lab) -> list[list[int]]:
    return [[e["epoch"] for e in lab.folder_of(run).metrics()] for run in lab.plan().runs]


def local_reference(lab: Lab, folder: Path, changes: dict) -> Lab:
    """The same profile by the local executor, started; wait for its last command."""
    reference = Lab(folder, lab.cluster)
    reference.profile(changes)
    reference.start("reproduce-table", "--jobs", 2)  # a thread each, as in the jobs
    return reference


def test_a_stage_longer_than_the_time_limit_is_chained(lab, tmp_path_factory):
    """Slurm's shortest limit is a minute; it tells of its end up to half a minute early."""
    changes = {
        "methods": ["sam"],
        "data": {"train_size": 300},
        "training": {"epochs": 80, "post_epochs": 0, "batch_size": 20},
    }
    lab.profile(changes)
    lab.cluster_file(resources={"time_limit": "1", "signal_seconds": 45})
    launcher = lab.reproduce()
    reference = local_reference(lab, tmp_path_factory.mktemp("reference"), changes)
    assert launcher.wait() == 0, launcher.said
    assert reference.launched[-1].wait() == 0
    (run,) = lab.plan().runs
    assert "timed out" in lab.causes(run)
    assert set(lab.causes(run)) == {"timed out", "done"}
    assert lab.folder_of(run).result()["starts"] >= 2
    assert results_of(lab) == results_of(reference)
    assert lab.table() == reference.table()


@pytest.mark.parametrize(
    ("steps_die_too", "epochs"), [(False, 100), (True, 40)], ids=["slurmd dies", "the node dies"]
)
def test_a_node_that_fails_and_comes_back(lab, tmp_path_factory, steps_die_too, epochs):
    """With slurmd alone gone, the old process trains on when Slurm has given the run to another."""
    changes = {
        "methods": ["sam"],
        "data": {"train_size": 200},
        "training": {"epochs": epochs, "post_epochs": 0, "batch_size": 20},
    }
    lab.profile(changes)
    lab.cluster_file()
    launcher = lab.reproduce()
    launcher.wait_for("RUNNING")
    (run,) = lab.plan().runs
    worker = lab.wait_under_way(run)
    node = lab.cluster.command("squeue", "-h", "-j", lab.job_of(run), "-o", "%N")
    lab.cluster.stop(node, signal.SIGKILL)
    if steps_die_too:
        task = parent_of(worker)
        for pid in (parent_of(task), task, worker):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: "down" in lab.cluster.command("sinfo", "-h", "-n", node, "-o", "%t"))
    lab.cluster.start(node)
    reference = local_reference(lab, tmp_path_factory.mktemp("reference"), changes)
    assert launcher.wait() == 0, launcher.said
    assert reference.launched[-1].wait() == 0
    if steps_die_too:
        assert lab.causes(run) == ["node failed", "done"]
    assert epochs_of(lab) == [list(range(1, epochs + 1))]
    assert results_of(lab) == results_of(reference)
    wait_until(
        lambda: (
            set(lab.cluster.command("sinfo", "-h", "-p", "main", "-N", "-o", "%t").split())
            == {"idle"}
        ),
        PATIENCE,
    )


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


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_a_failure_that_resubmit_mends(lab, tmp_path_factory):
    changes = {"methods": ["sam"], "training": {"epochs": 6, "post_epochs": 0, "batch_size": 10}}
    lab.profile(changes)
    lab.cluster_file(environment={"POF_CHECKPOINT_SECONDS": "0"})
    lab.runs_dir.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(lab.runs_dir)], check=True
    )
    try:
        launcher = lab.reproduce()
        assert launcher.wait() == 1, launcher.said
        (run,) = lab.plan().runs
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
        reference = local_reference(lab, tmp_path_factory.mktemp("reference"), changes)
        assert reference.launched[-1].wait() == 0
        assert results_of(lab) == results_of(reference)
        assert lab.table() == reference.table()
    finally:
        lab.close()
        subprocess.run(["umount", "--lazy", str(lab.runs_dir)], check=True)


def test_five_hundred_runs_take_few_calls_and_cancel_spares_the_others(lab, monkeypatch):
    """A stage that does nothing: submitted, watched and cancelled."""
    theirs = lab.cluster.command(
        "sbatch", "--parsable", "--hold", "-o", "/dev/null", "--wrap", "true"
    )
    for name, value in lab.environment.items():
        monkeypatch.setenv(name, value)
    (lab.folder / "orders").write_text("{}")
    path = lab.cluster_file(
        environment={"FAKE_ORDERS": str(lab.folder / "orders"), "PYTHONPATH": str(ROOT)},
        resources={"memory": "100M", "array_throttle": 4},
    )
    cluster = load_cluster(path)
    plan = make_plan(lab.folder, {"seeds": list(range(250)), "methods": ["sgd"]})
    plan.write(lab.runs_dir / "plans" / "tiny.json")
    assert len(plan.runs) == 500
    options = Options(lab.runs_dir, lab.folder, "cpu", cluster, ("-m", "tests.fake_worker", "work"))
    launcher = Launcher(plan, options, Slurm(cluster, lab.runs_dir / "slurm" / "jobs"))
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
