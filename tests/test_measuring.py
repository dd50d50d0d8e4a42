"""Measurements as runs of a store of their own: identities, failures, what is measured again."""

import json

import pytest
import torch

from benchmarks import assembly, measuring
from benchmarks.measure import Measurer, Request
from benchmarks.measure_worker import MeasuringWorker
from benchmarks.store import State, Store
from benchmarks.worker import Ending, Worker
from tests.harness import make_plan

CPU = torch.device("cpu")
REQUEST = {"block": "classifier", "top": 2}


@pytest.fixture
def trained(tmp_path):
    digits = assembly.load_dataset("digits", tmp_path)
    plan = make_plan(
        tmp_path,
        {"methods": ["sam"], "training": {"epochs": 1, "post_epochs": 1}},
        fingerprints={"digits": digits.fingerprint},
    )
    store = Store(tmp_path / "runs")
    worker = Worker(store, plan, tmp_path, device=CPU)
    assert [worker.carry_out(run)[0] for run in plan.runs] == [Ending.DONE] * 2
    return store, plan, tmp_path


def laid_out(trained, **request):
    store, plan, folder = trained
    wanted = REQUEST | request
    measurements, root, _ = measuring.prepare(plan, "tiny", store, plan.runs, wanted)
    measurer = Measurer(store, plan, folder, CPU, Request(**wanted))
    return MeasuringWorker(Store(root), measurements, measurer), measurements.runs, root


def test_a_measurement_stands_alone_and_has_its_own_identity(trained):
    store, plan, _ = trained
    _, runs, root = laid_out(trained)
    assert [run.parent for run in runs] == [None, None]
    assert len({run.identity for run in [*runs, *plan.runs]}) == 4
    assert root.parent.parent == store.root
    assert laid_out(trained)[1:] == (runs, root)
    assert laid_out(trained, top=3)[2] != root
    assert measuring.roots(store.root, "tiny") == sorted({root, laid_out(trained, top=3)[2]})
    assert measuring.roots(store.root, "another") == []


def test_a_network_trained_anew_is_measured_anew(trained):
    store, plan, _ = trained
    before = measuring.measurement_of(plan.runs[0], store)
    folder = store.folder(plan.runs[0])
    result = {k: v for k, v in folder.result().items() if k != "digest"}
    folder.write_result(result | {"checkpoint_sha256": "another"})
    assert measuring.measurement_of(plan.runs[0], store).identity != before.identity


def test_a_measurement_is_carried_out_once_and_says_what_did_not_converge(trained):
    store, plan, _ = trained
    worker, runs, root = laid_out(trained)
    assert worker.carry_out(runs[0]) == (Ending.DONE, "")
    folder = Store(root).folder(runs[0])
    assert folder.result()["unconverged"] == []
    assert len(store.folder(plan.runs[0]).measurements()) == 8
    written = folder.path.joinpath("result.json").read_bytes()
    assert worker.carry_out(runs[0]) == (Ending.DONE, "")
    assert folder.path.joinpath("result.json").read_bytes() == written
    assert Store(root).folder(runs[1]).state() is State.PENDING


def test_what_is_measured_already_is_kept_in_view_and_what_was_measured_elsewhere_is_not(trained):
    store, plan, _ = trained
    worker, runs, root = laid_out(trained)
    worker.carry_out(runs[0])
    measurements, *_ = measuring.prepare(plan, "tiny", store, [], REQUEST)
    assert measurements.runs == runs[:1]
    assert Store(root).folder(runs[0]).state() is State.DONE


def test_what_was_measured_and_is_lost_is_laid_out_again(trained):
    worker, runs, root = laid_out(trained)
    worker.carry_out(runs[0])
    laid_out(trained)
    assert Store(root).folder(runs[0]).state() is State.PENDING


def test_a_damaged_checkpoint_fails_its_measurement_alone(trained):
    store, plan, _ = trained
    worker, runs, root = laid_out(trained)
    (weights,) = store.folder(plan.runs[0]).checkpoints.glob("*.pt")
    weights.write_bytes(b"damaged")
    ending, reason = worker.carry_out(runs[0])
    assert ending is Ending.FAILED
    assert "the final checkpoint is missing or damaged" in reason
    assert json.loads((Store(root).folder(runs[0]).path / "failure.json").read_text())
    assert worker.carry_out(runs[1]) == (Ending.DONE, "")


def test_a_run_that_another_process_holds_is_waited_for(trained):
    store, plan, _ = trained
    worker, runs, _ = laid_out(trained)
    with store.folder(plan.runs[0]).lock():
        assert worker.carry_out(runs[0])[0] is Ending.BUSY
    assert worker.carry_out(runs[0])[0] is Ending.DONE
