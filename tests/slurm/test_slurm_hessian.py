"""``make hessian`` on Slurm: what is missing is trained in jobs, and measured in jobs."""

import json

from benchmarks import measuring
from benchmarks import plan as planning
from benchmarks.executors.slurm.attempts import Attempts
from benchmarks.store import Store
from tests.slurm.conftest import Lab

CHANGES = {"methods": ["sam", "sam+pof"]}
TIMED = ("seconds", "digest", "checkpoint_sha256")  # the latter two are over seconds too


def measurements_of(lab: Lab) -> dict:
    found = {}
    for run in lab.plan().runs:
        for path in lab.folder_of(run).measurements():
            record = json.loads(path.read_text())
            found[run.name, path.name] = {k: v for k, v in record.items() if k not in TIMED}
    return found


def test_the_landscape_is_measured_in_jobs_as_it_is_here(lab, tmp_path_factory, cluster):
    lab.profile(CHANGES)
    options = ["--top", 3, "--executor", "slurm", "--cluster", lab.cluster_file()]
    lab.finish("calibrate", "--jobs", 1, "--seconds", 0.1)
    launcher = lab.start("hessian", *options)
    launcher.wait_for("measuring 3 networks, in jobs\nsubmitted to Slurm")
    launcher.kill()
    assert "predicted beside actual" in launcher.said
    assert "whole sweep, 2 jobs at once" in launcher.said
    submitted = lab.calls()["sbatch"]
    said = lab.finish("hessian", *options)
    assert lab.calls()["sbatch"] == submitted
    assert "submitted" not in said

    (root,) = measuring.roots(lab.runs_dir, "tiny")
    plan, store = planning.read(measuring.plan_file(root, "tiny")), Store(root)
    for run in plan.runs:
        begun, ended = Attempts(store.folder(run)).read()
        assert (begun.event, ended.cause) == ("begun", "done")
        assert begun.job == ended.job

    reference = Lab(tmp_path_factory.mktemp("reference"), cluster)
    reference.profile(CHANGES)
    reference.finish("hessian", "--top", 3, "--jobs", 2)
    assert len(measurements_of(lab)) == 3 * 2 * 4  # runs, splits, kinds
    assert measurements_of(lab) == measurements_of(reference)
    page = "tiny/hessian.csv"
    assert (lab.results / page).read_bytes() == (reference.results / page).read_bytes()

    assert "3 runs: 3 done, 0 with a job" in lab.finish("status")
    (store.folder(plan.runs[0]).path / "result.json").unlink()
    (lab.folder_of(lab.plan().runs[0]).path / "measurements" / "range-train.json").unlink()
    again = lab.finish("hessian", *options)
    assert "measuring 1 networks" in again
    assert measurements_of(lab) == measurements_of(reference)
