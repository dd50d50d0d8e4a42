"""Calibration: it measures the real code, needs no data, and predicts a real sweep's parts."""

import math
import sys

import pytest
import torch

from benchmarks import calibrate, cli, forecast
from benchmarks.cost import WorkerKind, calibration_file, read_calibration, run_cost
from benchmarks.executors import local
from benchmarks.store import Store
from benchmarks.worker import Worker, device_name
from tests.harness import make_plan, profile_file

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _leave_torch_as_it_was():
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def test_an_outline_counts_wrn_28_10_as_published(tmp_path):
    plan = make_plan(tmp_path, {"datasets": ["cifar10"], "backbones": ["wrn_28_10"], "data": None})
    found = calibrate.outline(plan.runs[0].settings)
    assert found.forward_flops / 2 == pytest.approx(5.24e9, rel=2e-3)
    assert found.parameters == 36_479_194
    assert (found.train_images, found.test_images) == (50_000, 10_000)


def test_an_outline_draws_nothing_and_computes_nothing(tmp_path):
    settings = make_plan(tmp_path).runs[0].settings
    before = torch.get_rng_state()
    calibrate.outline(settings)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("algorithm", ["sgd", "sam", "pof"])
def test_every_method_is_measured_without_data(tmp_path, algorithm, monkeypatch):
    monkeypatch.setattr(calibrate, "load", None)
    plan = make_plan(tmp_path)
    run = next(run for run in plan.runs if run.settings.algorithm == algorithm)
    before = torch.get_rng_state()
    rates = calibrate.measure(run.settings, CPU, tmp_path, seconds=0.05)
    assert torch.equal(torch.get_rng_state(), before)
    for value in rates.model_dump().values():
        assert math.isfinite(value)
        assert value > 0
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]  # no checkpoint is left


def test_a_block_of_steps_is_as_many_steps_as_asked_for(tmp_path):
    settings = make_plan(tmp_path).runs[0].settings
    subject = calibrate.random_subject(settings, CPU, calibrate._images(settings))
    trainer = calibrate.assembly.build_trainer(settings, subject, CPU)
    per_epoch = trainer.batches.per_epoch
    assert per_epoch == 6
    for count in (1, 4, 1, 13):  # ends within an epoch, at its end, and epochs later
        before = trainer.epoch * per_epoch + trainer.step
        calibrate._time_steps(trainer, count, CPU)
        assert trainer.epoch * per_epoch + trainer.step == before + count


def test_the_command_measures_a_profile_and_plan_then_has_no_estimate(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(local, "_cores", lambda: 1)
    profile = profile_file(tmp_path)
    runs_dir = tmp_path / "runs"

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, arguments)])
        with pytest.raises(SystemExit, match=r"^0$"):
            cli.main()
        return capsys.readouterr().out

    arguments = ("-p", profile, "--runs-dir", runs_dir, "--data-dir", tmp_path / "data")
    out = command("calibrate", *arguments, "--jobs", "1", "--seconds", "0.1", "--device", "cpu")
    path = calibration_file(runs_dir, device_name(CPU))
    assert str(path) in out.replace("\n", "")
    found = read_calibration(path)
    assert [m.key.algorithm for m in found.measurements] == ["sgd", "sam", "pof"]
    (start,) = found.starts.values()
    assert start.process > 0
    assert start.loading["digits"] > 0
    assert "estimate" not in command("plan", "-p", profile, "--runs-dir", runs_dir)


def test_a_companion_that_cannot_work_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    plan = make_plan(tmp_path)
    with (
        pytest.raises(calibrate.UserError, match="ended"),
        calibrate._company(plan, CPU, WorkerKind(1, 1), tmp_path),
    ):
        pass


def test_the_prediction_has_every_part_that_a_real_run_has(tmp_path):
    """No claim on time, which other processes share: steps, tests and images are the run's own."""
    from benchmarks.assembly import load_dataset

    fingerprint = load_dataset("digits", tmp_path).fingerprint
    plan = make_plan(
        tmp_path, {"methods": ["sgd", "sgd+pof"]}, fingerprints={"digits": fingerprint}
    )
    worker = Worker(Store(tmp_path / "runs"), plan, tmp_path, device=CPU)
    for run in plan.runs:
        ending, reason = worker.carry_out(run)
        assert ending == "DONE", reason
        settings = run.settings
        rates = calibrate.measure(settings, CPU, tmp_path, seconds=0.05)
        cost = run_cost(run, rates, calibrate.outline(settings), "measured")
        folder = worker.store.folder(run)
        epochs = settings.last_epoch - settings.first_epoch
        tests = sum("test_error" in record for record in folder.metrics())
        expected = epochs * 6 * rates.step + tests * 355 * rates.evaluation + rates.save
        assert cost.seconds == pytest.approx(expected)
        (checkpoint,) = (folder.path / "checkpoints").iterdir()
        # Weights and momentum are most of a file that holds generators and names as well.
        assert 0.5 * cost.checkpoint_bytes < checkpoint.stat().st_size < 2 * cost.checkpoint_bytes
    taken = forecast.taken(plan, worker.store)
    assert set(taken) == {run.identity for run in plan.runs}
    assert min(taken.values()) > 0
