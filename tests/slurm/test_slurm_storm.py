"""One sweep through everything that happens on clusters; it ends with the laptop's table."""

import os
import signal
import subprocess

import pytest

from benchmarks.executors.slurm.submissions import Submissions
from tests.harness import wait_until
from tests.slurm.conftest import PATIENCE, Lab, parent_of, results_of

EPOCHS = 12  # of each stage
SETTINGS = {
    "seeds": [0, 1, 2],
    "methods": ["sam", "sam+pof"],
    "data": {"train_size": 200},
    "training": {"epochs": EPOCHS, "post_epochs": EPOCHS, "batch_size": 20},
    "schedule": {"milestones": [9]},
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory, cluster):
    """The same profile, carried out by the local executor."""
    lab = Lab(tmp_path_factory.mktemp("reference"), cluster)
    lab.profile(SETTINGS)
    lab.finish("reproduce-table", "--jobs", 2)
    return lab


@pytest.fixture(scope="module")
def storm(tmp_path_factory, cluster):
    lab = Lab(tmp_path_factory.mktemp("storm"), cluster)
    lab.profile(SETTINGS)
    lab.cluster_file()
    lab.break_command("sacct")

    # The launcher dies when it has submitted; another takes over.
    first = lab.reproduce()
    first.wait_for("submitted to Slurm")
    first.kill()
    lab.seen = {"sbatch at first": lab.calls()["sbatch"]}
    launcher = lab.reproduce()

    # In the middle of SAM: a worker dies, a whole task dies, and a job is preempted.
    sam = [lab.run("sam", 0, seed) for seed in SETTINGS["seeds"]]
    held = lab.hold(*sam)
    os.kill(held[1], signal.SIGKILL)
    os.kill(parent_of(held[2]), signal.SIGKILL)
    os.kill(held[2], signal.SIGCONT)
    wait_until(lambda: "crashed" in lab.causes(sam[1]), PATIENCE)
    wait_until(lambda: lab.state_of_job(sam[2]) == "FAILED", PATIENCE)
    lab.preempt(sam[0])
    lab.release_when_told(held[0])

    # The controller goes away and comes back.
    wait_until(lambda: lab.restarts_of(sam[0]) == 1, PATIENCE)
    lab.cluster.stop("slurmctld")
    launcher.wait_for("controller does not answer")
    lab.seen["status"] = lab.finish("status")
    lab.cluster.start("slurmctld")

    # In the middle of PoF: a job is preempted, another one cancelled.
    pof = [lab.run("sam+pof", EPOCHS, seed) for seed in (0, 1)]
    held = lab.hold(*pof)
    lab.cluster.command("scancel", lab.job_of(pof[1]))
    lab.release_when_told(held[1])
    lab.preempt(pof[0])
    lab.release_when_told(held[0])

    lab.seen["exit status"] = launcher.wait()
    lab.seen["said"] = launcher.said
    lab.seen["again"] = lab.reproduce()
    lab.seen["again"].wait()
    yield lab
    lab.close()


def test_the_table_and_every_weight_are_the_local_executors(storm, reference):
    assert storm.seen["again"].process.returncode == 0, storm.seen["again"].said
    assert results_of(storm) == results_of(reference)
    assert storm.table() == reference.table()


def test_no_epoch_is_on_record_twice(storm):
    for run in storm.plan().runs:
        epochs = [line["epoch"] for line in storm.folder_of(run).metrics()]
        assert epochs == list(range(run.settings.first_epoch + 1, run.settings.last_epoch + 1))


def test_causes_are_told_apart(storm):
    assert "preempted" in storm.causes(storm.run("sam", 0, 0))
    assert "preempted" in storm.causes(storm.run("sam+pof", EPOCHS, 0))
    assert "crashed" in storm.causes(storm.run("sam", 0, 1))
    assert "crashed" in storm.causes(storm.run("sam", 0, 2))
    assert "cancelled" in storm.causes(storm.run("sam+pof", EPOCHS, 1))
    for run in storm.plan().runs:
        assert storm.causes(run)[-1] == "done"


def test_a_preempted_run_continues_where_it_was(storm):
    for method, first in (("sam", 0), ("sam+pof", EPOCHS)):
        run = storm.run(method, first, 0)
        assert storm.folder_of(run).result()["starts"] >= 2


def test_a_cancelled_run_is_left_until_the_command_is_given_again(storm):
    assert storm.seen["exit status"] == 1
    assert "was cancelled; it is left as it is" in storm.seen["said"]


def test_a_controller_that_was_away_is_noticed_when_it_is_back(storm):
    assert "controller is back" in storm.seen["said"]


def test_a_launcher_that_takes_over_submits_nothing_again(storm):
    assert storm.seen["sbatch at first"] == 3
    # The task that was killed, its two children that Slurm dropped with it, and the cancelled run.
    again = [s.tasks for s in Submissions(storm.runs_dir / "slurm").read()][3:]
    names = {run.identity: (run.method, run.settings.seed) for run in storm.plan().runs}
    resubmitted = [names[name] for tasks in again for task in tasks for name in task]
    assert sorted(resubmitted) == [("sam", 2), ("sam", 2), ("sam+pof", 1), ("sam+pof", 2)]


def test_status_needs_no_controller(storm):
    assert "seed 0" in storm.seen["status"]
    assert "controller does not answer" in storm.seen["status"]


def test_a_finished_sweep_asks_slurm_for_next_to_nothing(storm):
    before = storm.calls()
    said = storm.finish(
        "reproduce-table", "--executor", "slurm", "--cluster", storm.folder / "cluster.toml"
    )
    assert "submitted" not in said
    assert storm.calls() - before == {"squeue": 1}
    left = subprocess.run(
        ["squeue", "-h"], env=storm.cluster.environment(), capture_output=True, text=True
    )
    assert left.stdout == ""
