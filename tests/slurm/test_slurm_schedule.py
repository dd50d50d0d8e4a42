"""The simulated schedule against the real one, on two nodes."""

import time

import pytest

from benchmarks.cost import Calibration, Estimate, RunCost, WorkerKind
from benchmarks.forecast import Calibrated, Forecast, Jobs
from benchmarks.store import State
from tests.harness import make_plan
from tests.slurm.conftest import Lab, made_up

# A node has one GPU, so two jobs run at once; of an array only one, so two arrays take turns.
ONE_A_GPU = {"gres": "gpu:1", "array_throttle": 1, "memory": "100M"}
SECONDS = {"sgd": 6.0, "sam": 9.0, "pof": 4.0}


def carry_out(lab: Lab, monkeypatch, plan, seconds, **cluster) -> tuple[float, Jobs]:
    """Seconds that a sweep of runs took which last as long as they are told."""
    orders = {run.label: [f"last {seconds[run.identity]}"] for run in plan.runs}
    launcher = made_up(lab, monkeypatch, plan, orders, **cluster)
    began = time.monotonic()
    while launcher.step():
        time.sleep(launcher.cluster.polling.folders_seconds)
    assert set(launcher.sweep.states.values()) == {State.DONE}
    return time.monotonic() - began, Jobs(launcher.cluster)


def test_the_simulated_schedule_is_the_real_one(lab, tmp_path_factory, cluster, monkeypatch):
    # What a job costs beside its runs, on this machine and now: ten jobs, two at a time.
    first = make_plan(lab.folder, {"seeds": list(range(5)), "methods": ["sgd"]})
    nothing = dict.fromkeys([run.identity for run in first.runs], 0.0)
    taken, _ = carry_out(lab, monkeypatch, first, nothing, resources={"gres": "gpu:1"})
    start_seconds = taken / 5

    lab = Lab(tmp_path_factory.mktemp("sweep"), cluster)
    plan = make_plan(lab.folder, {"seeds": list(range(3)), "methods": ["sgd", "sam", "sam+pof"]})
    seconds = {
        run.identity: SECONDS[run.settings.algorithm] + run.settings.seed for run in plan.runs
    }
    took, jobs = carry_out(lab, monkeypatch, plan, seconds, runs_per_gpu=2, resources=ONE_A_GPU)
    costs = {name: RunCost(value, 0.0, 0, "measured") for name, value in seconds.items()}
    nothing_else = Calibration(device="", kind="cpu", starts={}, measurements=[])
    source = Calibrated(nothing_else, WorkerKind(threads=1, jobs=2))
    forecast = Forecast(plan, costs, {}, source, Estimate())
    schedule = forecast.schedule(2, jobs=jobs._replace(start_seconds=start_seconds))
    print(f"simulated {schedule.makespan:.1f} s, real {took:.1f} s, {start_seconds:.1f} s a job")
    assert schedule.makespan == pytest.approx(took, rel=0.2)
