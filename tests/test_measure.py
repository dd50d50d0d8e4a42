"""Measurements of finished runs: what they hold, that they resume, and what tables leave out."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks import assembly, checkpoint
from benchmarks import plan as planning
from benchmarks.errors import UserError
from benchmarks.measure import Measurer, Request
from benchmarks.report import write_report
from benchmarks.report.landscape import _turned
from benchmarks.store import Store
from benchmarks.worker import Ending, Worker
from tests.harness import files_of, make_plan

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny plan, trained: where its runs are, and the plan."""
    folder = tmp_path_factory.mktemp("measured")
    digits = assembly.load_dataset("digits", folder)
    plan = make_plan(
        folder, {"methods": ["sam", "sam+pof"]}, fingerprints={"digits": digits.fingerprint}
    )
    store = Store(folder / "runs")
    worker = Worker(store, plan, folder, device=CPU)
    assert [worker.carry_out(run)[0] for run in plan.runs] == [Ending.DONE] * 3
    return store, plan, folder


def measurement(store, run, name):
    return json.loads((store.folder(run).path / "measurements" / name).read_text())


def test_the_largest_eigenvalue_is_autograds(trained):
    store, plan, folder = trained
    run = plan.runs[0]
    measurer = Measurer(store, plan, folder, CPU, Request(top=3))
    assert measurer.measure(run) == []
    found = measurement(store, run, "hessian-classifier-train.json")
    subject = assembly.prepare_subject(run.settings, assembly.load_dataset("digits", folder), CPU)
    network = assembly.build_network(run.settings, subject.info, CPU).eval()
    state = checkpoint.load_newest(store.folder(run).checkpoints).state
    network.load_state_dict(state["trainer"]["network"])
    with torch.no_grad():
        images = subject.normalise(subject.train_images).permute(0, 3, 1, 2)
        features = network.feature_extractor(images).double()
    weight = torch.cat(
        [network.classifier.weight, network.classifier.bias[:, None]], dim=1
    ).double()
    ones = torch.ones(len(features), 1, dtype=torch.float64)

    def loss(theta):
        return F.cross_entropy(torch.cat([features, ones], 1) @ theta.T, subject.train_labels)

    # Power iteration by forward-over-reverse: nothing of the closed form in it.
    vector = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).double()
    for _ in range(400):
        vector = vector / vector.norm()
        product = torch.func.jvp(torch.func.grad(loss), (weight.detach(),), (vector,))[1]
        value, vector = (vector * product).sum(), product
    assert found["eigenvalues"][0] == pytest.approx(float(value), rel=1e-5)
    assert found["samples"] == 150
    assert max(found["residuals"]) <= 1e-6


def test_what_is_measured_is_not_measured_again_and_what_is_damaged_is(trained):
    store, plan, folder = trained
    run = plan.runs[0]
    measurer = Measurer(store, plan, folder, CPU, Request(top=3))
    measurer.measure(run)
    assert run not in measurer.to_do()
    before = files_of(store.folder(run).path / "measurements")
    assert measurer.measure(run) == []
    assert files_of(store.folder(run).path / "measurements") == before
    path = store.folder(run).path / "measurements" / "range-test.json"
    path.write_bytes(path.read_bytes()[:-40])
    assert measurer.missing(run) == ["range-test.json"]
    measurer.measure(run)
    timed = {"seconds", "digest"}
    again = measurement(store, run, "range-test.json")
    first = json.loads(before["range-test.json"])
    assert {k: v for k, v in again.items() if k not in timed} == {
        k: v for k, v in first.items() if k not in timed
    }
    other = Measurer(store, plan, folder, CPU, Request(top=3, samples=50))
    assert set(other.missing(run)) == set(before)


def test_the_effective_loss_is_measured_below_no_perturbation_and_near_its_prediction(trained):
    store, plan, folder = trained
    Measurer(store, plan, folder, CPU, Request(top=3)).measure(plan.runs[0])
    found = measurement(store, plan.runs[0], "range-train.json")
    assert len(found["xi"]) == 200
    assert np.all(np.array(found["xi"]) >= 0)
    assert np.isfinite([found["effective_measured"], found["effective_predicted"]]).all()


def test_the_numbers_of_random_vectors_are_part_of_what_was_asked_for(trained):
    store, plan, folder = trained
    block = {"block": "feature_extractor.bn_out", "splits": ("test",), "top": 1, "samples": 10}
    few = {"trace_probes": 2, "density_probes": 2, "density_steps": 3}
    run, name = plan.runs[0], "feature_extractor.bn_out-test.json"
    Measurer(store, plan, folder, CPU, Request(**block, **few)).measure(run)
    density = measurement(store, run, f"density-{name}")
    assert len(density["nodes"]) == 2 * 3
    assert few.items() <= density["request"].items()
    assert run not in Measurer(store, plan, folder, CPU, Request(**block, **few)).to_do()
    assert run in Measurer(store, plan, folder, CPU, Request(**block)).to_do()


def test_a_block_that_is_not_there_is_a_users_mistake(trained):
    store, plan, folder = trained
    request = Request(block="feature_extractor.bn_oud", splits=("test",), samples=10)
    with pytest.raises(UserError, match=r"did you mean one of feature_extractor\.bn_out"):
        Measurer(store, plan, folder, CPU, request).measure(plan.runs[0])


def test_an_eigenvector_is_drawn_alike_whichever_sign_it_came_with():
    line = np.array([0.8, 0.1, 0.3])
    plane = np.add.outer([3.0, 0.0, 1.0], line)
    np.testing.assert_array_equal(_turned(line), [0.8, 0.1, 0.3][::-1])
    for rows in (1, -1):
        for columns in (1, -1):
            turned = _turned(plane[::rows, ::columns])
            np.testing.assert_array_equal(turned, plane[::-1, ::-1])


def test_a_solver_cut_short_says_so_and_its_number_is_in_no_table(trained, tmp_path):
    store, plan, folder = trained
    results = tmp_path / "results" / "tiny"
    exact = Measurer(store, plan, folder, CPU, Request(top=3))
    for run in plan.runs:
        exact.measure(run)
    cut = Request(block="classifier", top=3, max_iterations=3)
    run = plan.runs[-1]
    unfinished = Measurer(store, plan, folder, CPU, cut)
    # The tiny matrix would be solved densely, exactly: the block by autograd is not.
    request = Request(
        block="feature_extractor.bn_out",
        splits=("train",),
        top=2,
        samples=10,
        max_iterations=3,
        trace_probes=2,
        density_probes=1,
        density_steps=5,
    )
    block = Measurer(store, plan, folder, CPU, request)
    assert unfinished.measure(run) == []
    lines = block.measure(run)
    assert lines
    assert all("NOT CONVERGED" in line for line in lines)
    store.publish(plan, Store(results / "runs"))
    plan.write(results / planning.FILE)
    write_report(results)
    table = (results / "hessian.csv").read_text()
    assert "classifier" in table
    rows = [line for line in table.splitlines() if "bn_out" in line]
    top = measurement(store, run, "hessian-feature_extractor.bn_out-train.json")["eigenvalues"][0]
    assert rows
    for row in rows:
        assert f"{top:.6f}" not in row
        assert f"{top:.6g}" not in row
