"""What a sweep costs: counted by hand, and what the command says and refuses."""

import subprocess
import sys

import pytest
from rich.console import Console

from benchmarks import cli, forecast
from benchmarks import plan as planning
from benchmarks.cost import (
    Calibration,
    Estimate,
    Images,
    Measurement,
    Outline,
    Rates,
    Start,
    WorkerKind,
    calibration_file,
    evaluations,
    images_of,
    key_of,
    passes,
    priorities,
    read_calibration,
    read_calibrations,
    run_cost,
    start_key,
    work,
    write_calibration,
)
from benchmarks.errors import UserError
from benchmarks.executors.slurm.cluster import Cluster
from benchmarks.forecast import Calibrated, Jobs
from benchmarks.settings import DataSettings, load_profile
from benchmarks.store import Store
from tests.harness import ROOT, finish, make_plan, profile_file

WORKER = WorkerKind(threads=1, jobs=2)
OUTLINE = Outline(train_images=1000, test_images=200, parameters=70, buffers=10, forward_flops=1e6)
STEPS = {"sgd": 1.0, "sam": 2.0, "pof": 1.5}  # seconds


def calibration(
    plan, *, device="a processor", steps=STEPS, setup=0.0, save=0.0, start=None, worker=WORKER
):
    """Made-up measurements of every step in a plan."""
    measurements = {
        key_of(run.settings, worker).model_dump_json(): Measurement(
            key=key_of(run.settings, worker),
            outline=OUTLINE,
            rates=Rates(step=steps[run.settings.algorithm], evaluation=0.0, setup=setup, save=save),
        )
        for run in plan.runs
        if run.settings.algorithm in steps
    }
    return Calibration(
        device=device,
        kind="cpu",
        starts={start_key(worker): start or Start()},
        measurements=list(measurements.values()),
    )


def predict(plan, **options):
    return forecast.predict(plan, Calibrated(calibration(plan, **options), WORKER), Estimate())


@pytest.fixture(scope="module")
def paper():
    profile = load_profile("paper")
    plan = planning.expand(profile, {name: f"sha256:{name}" for name in profile.datasets}, {})
    return forecast.predict(plan, None, Estimate())


@pytest.fixture
def command(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, arguments)])
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = end.code or 0
        return status, *capsys.readouterr()

    return run


# The paper's profile, by hand


def test_the_paper_profile_has_the_runs_and_epochs_counted_by_hand(paper):
    # 4 data sets × 2 augmentations × 5 seeds = 40 cells; in each, two first stages of 200 epochs
    # and four second stages of 50.
    runs = paper.plan.runs
    assert len(runs) == 40 * (2 + 4) == 240
    assert sum(r.settings.last_epoch - r.settings.first_epoch for r in runs) == 40 * 600 == 24_000
    stages = forecast.stages(paper.plan)
    assert len(stages) == 8 * 6
    assert {len(stage.runs) for stage in stages} == {5}


def test_sharing_saves_what_is_counted_by_hand(paper):
    share = forecast.sharing(paper)
    assert (share.epochs, share.unshared_epochs) == (24_000, 40 * 4 * 250)
    arms = [arm for arm in paper.plan.arms if arm.method in ("sam", "sam+pof")]
    one = [a.model_copy(update={"runs": {0: a.runs[0]}}) for a in arms[:2]]
    pair = forecast.sharing(paper, one)
    assert (pair.epochs, pair.unshared_epochs) == (300, 500)
    # In forward passes an image: SGD 3, SAM 6, PoF 4; tests are a small part beside.
    unshared = 2 * 250 * 3 + 2 * 250 * 6 - 2 * 50 * (3 + 6) + 2 * 50 * 4 + 50 * (3 + 6)
    shared = 200 * (3 + 6) + 50 * (3 + 6) + 2 * 50 * 4
    assert unshared == 4450
    assert share.seconds / share.unshared_seconds == pytest.approx(shared / unshared, rel=0.01)


def test_a_network_costs_the_operations_and_the_disk_counted_by_hand(paper):
    cifar = next(run for run in paper.plan.runs if run.settings.dataset == "cifar10")
    cost = paper.costs[cifar.identity]
    # 36,479,194 parameters, each with its momentum; BatchNorm's mean and variance for each of
    # the channels it normalises, and a count for each of 25 layers.
    channels = 16 + 7 * 160 + 160 + 7 * 320 + 320 + 7 * 640 + 640
    assert cost.checkpoint_bytes == 4 * (2 * 36_479_194 + 2 * channels + 25)
    # 5.24 GMAC an image and pass, ×3 for SGD, 50,000 images, 200 epochs and as many tests.
    flops = 2 * 5.24e9 * (200 * 50_000 * 3 + 200 * 10_000)
    assert cost.seconds == pytest.approx(flops / (312e12 * 0.35), rel=2e-3)
    assert cost.basis == "estimate"


def test_an_estimate_follows_the_peak_and_the_share_of_it_that_is_stated(paper):
    run = paper.plan.runs[0]
    twice = Estimate(peak_tflops=624.0).rates(run.settings, OUTLINE)
    once = Estimate().rates(run.settings, OUTLINE)
    half = Estimate(utilisation=0.175).rates(run.settings, OUTLINE)
    assert twice.step == pytest.approx(once.step / 2) == pytest.approx(half.step / 4)
    assert once.step == pytest.approx(256 * 3 * 1e6 / (312e12 * 0.35))
    assert "35%" in Estimate().describe()
    assert "624 TFLOP/s" in Estimate(peak_tflops=624.0).describe()


# A run


def test_a_run_costs_its_steps_its_tests_and_its_checkpoints(tmp_path):
    plan = make_plan(tmp_path)
    sam = next(run for run in plan.runs if run.method == "sam" and run.parent is None)
    rates = Rates(step=2.0, evaluation=0.01, setup=3.0, save=0.5)
    cost = run_cost(sam, rates, OUTLINE, "measured")
    # 2 epochs of 150 images in batches of 25, tested on 200 images after each.
    assert cost.seconds == 2 * 6 * 2.0 + 2 * 200 * 0.01 + 0.5
    assert cost.occupied == cost.seconds + 3.0
    slow = run_cost(sam, Rates(step=20.0, evaluation=0.0, save=0.5), OUTLINE, "measured")
    assert slow.seconds == 240 + (240 // 60 + 1) * 0.5  # a checkpoint a minute and the last


def test_tests_are_counted_every_so_many_epochs_and_after_the_last(tmp_path):
    for every, expected in ((1, [2, 1]), (2, [1, 1]), (3, [1, 1]), (10, [1, 1])):
        plan = make_plan(tmp_path, {"training": {"evaluate_every": every}})
        first = next(run for run in plan.runs if run.parent is None)
        second = next(run for run in plan.runs if run.parent is not None)
        assert [evaluations(first), evaluations(second)] == expected


def test_a_step_costs_the_passes_of_its_method(tmp_path):
    plan = make_plan(tmp_path, {"pof": {"range_batch_size": 50}})
    found = {run.settings.algorithm: passes(run.settings) for run in plan.runs}
    assert found == {"sgd": 3, "sam": 6, "pof": 3 + 2}  # B is twice as large as B̃
    plain = make_plan(tmp_path)
    assert {passes(r.settings) for r in plain.runs if r.settings.pof is not None} == {4}


def test_images_are_those_trained_and_tested_on():
    whole = Images(1000, 200)
    assert images_of(DataSettings(), whole) == (1000, 200)
    assert images_of(DataSettings(train_size=10), whole) == (10, 200)
    assert images_of(DataSettings(holdout=100), whole) == (900, 100)


def test_work_counts_the_images_that_a_data_set_has():
    svhn = planning.expand(load_profile("paper"), {"svhn": "x", "cifar10": "x"}, {})
    by_dataset = {run.settings.dataset: work(run) for run in reversed(svhn.runs)}
    assert by_dataset["svhn"] / by_dataset["cifar10"] == 604_388 / 50_000


def test_priority_is_the_longest_way_to_the_end(tmp_path):
    plan = make_plan(tmp_path)
    found = priorities(plan)
    for run in plan.runs:
        below = [found[child.identity] for child in plan.runs if child.parent == run.identity]
        assert found[run.identity] == work(run) + max(below, default=0)


# Measured and estimated


def test_measured_times_are_used_where_they_fit_and_nowhere_else(tmp_path):
    plan = make_plan(tmp_path)
    found = predict(plan, steps={"sgd": 1.0, "sam": 2.0})
    basis = {run.settings.algorithm: found.costs[run.identity].basis for run in plan.runs}
    assert basis == {"sgd": "measured", "sam": "measured", "pof": "estimate"}
    assert "(estimate)" in found.amount(plan.runs)
    measured = [run for run in plan.runs if run.settings.pof is None]
    assert "estimate" not in found.amount(measured)
    other = make_plan(tmp_path, {"training": {"batch_size": 30}})
    elsewhere = forecast.predict(other, found.source, Estimate())
    assert elsewhere.estimated(other.runs)


def test_the_kind_of_worker_that_most_was_measured_with_is_chosen(tmp_path):
    plan = make_plan(tmp_path)
    some = calibration(plan, steps={"sgd": 1.0}, device="some")
    everything = calibration(plan, device="everything")
    assert forecast.choose([some, everything], plan) == Calibrated(everything, WORKER)
    again = calibration(plan, device="later")
    assert forecast.choose([again, everything], plan) == Calibrated(again, WORKER)
    assert forecast.choose([], plan) is None
    assert forecast.choose([calibration(make_plan(tmp_path), steps={})], plan) is None


def test_the_schedule_is_simulated_with_lineage_and_start_up(tmp_path):
    plan = make_plan(tmp_path)
    found = predict(plan, setup=1.0, start=Start(process=10.0, loading={"digits": 5.0}))
    # Of 6 steps an epoch: sgd 12 + 6 s, sam 24 + 12 s, PoF 9 s; a second to begin each.
    total = 13 + 7 + 25 + 13 + 10
    assert found.seconds(plan.runs) == total
    assert found.schedule(1).makespan == 15 + total
    assert found.schedule(2).makespan == 15 + 25 + 13
    assert found.schedule(1, jobs=jobs(start_seconds=2.0)).makespan == 5 * (15 + 2) + total
    left = [run for run in plan.runs if run.settings.pof is not None]
    assert found.schedule(1, left).makespan == 15 + 10


def jobs(start_seconds=0.0, requeue_seconds=0.0, **cluster):
    made = Cluster.model_validate({"title": "", **cluster})
    return Jobs(made, start_seconds, requeue_seconds)


def test_jobs_start_in_the_order_of_their_arrays(tmp_path):
    plan = make_plan(tmp_path, {"seeds": [0, 1]})
    tasks = jobs().tasks(predict(plan), plan.runs)
    # SGD 0–2, then SGD 2–3; SAM 0–2, then SAM and PoF 2–3; a task a seed, after its parent's.
    assert [task.name for task in tasks] == [f"{i}_{seed}" for i in range(5) for seed in range(2)]
    assert [task.seconds for task in tasks[::2]] == [12, 6, 24, 12, 9]
    parents = [None, None, "0_0", "0_1", None, None, "2_0", "2_1", "2_0", "2_1"]
    assert [task.parent for task in tasks] == parents
    schedule = predict(plan).schedule(1, jobs=jobs())
    assert [piece.task for piece in schedule.pieces] == [task.name for task in tasks]


def test_a_cluster_s_throttle_holds_back_its_jobs(tmp_path):
    plan = make_plan(tmp_path, {"seeds": [0, 1, 2], "methods": ["sgd"]})
    found = predict(plan)
    assert found.schedule(9, jobs=jobs()).makespan == 12 + 6
    throttled = jobs(resources={"array_throttle": 1})
    assert found.schedule(9, jobs=throttled).makespan == 3 * 12 + 6


def test_runs_that_share_a_job_take_as_long_as_was_measured_side_by_side(tmp_path):
    plan = make_plan(tmp_path, {"seeds": [0, 1, 2, 3, 4], "methods": ["sam"]})
    two, three = (jobs(runs_per_gpu=count) for count in (2, 3))
    assert WORKER.jobs == 2
    found = predict(plan)
    tasks = two.tasks(found, plan.runs)
    assert [task.seconds for task in tasks] == [24] * 3 + [12] * 3  # two, two and one
    assert found.schedule(1, jobs=two).makespan == 3 * 24 + 3 * 12
    # Nothing is known of three at once: they take turns.
    assert [task.seconds for task in three.tasks(found, plan.runs)] == [72, 48, 36, 24]
    assert found.schedule(1, jobs=jobs()).makespan == 5 * (24 + 12)


def test_a_stage_of_its_own_limits_keeps_them(tmp_path):
    plan = make_plan(tmp_path, {"methods": ["sam+pof"]})
    found = predict(plan, steps={"sam": 20.0, "pof": 15.0})  # 240 s, then 90 s
    limits = {"time_limit": "2", "signal_seconds": 20}
    chained = jobs(requeue_seconds=7.0, stages={"pof": limits})
    assert found.schedule(1, jobs=chained).makespan == 240 + 90
    both = jobs(requeue_seconds=7.0, resources=limits)
    assert found.schedule(1, jobs=both).makespan == 240 + 2 * 7 + 90  # 100 s, 100 s, 40 s


def test_a_time_limit_that_leaves_no_time_to_train_is_one_line(tmp_path):
    found = predict(make_plan(tmp_path), start=Start(process=100.0))
    with pytest.raises(UserError, match="leaves no time to train"):
        found.schedule(1, jobs=jobs(resources={"time_limit": "1"}))


def test_what_was_measured_with_as_many_on_a_device_is_preferred(tmp_path):
    plan = make_plan(tmp_path)
    alone, shared = WorkerKind(threads=1, jobs=1), WorkerKind(threads=1, jobs=4)
    both = calibration(plan, worker=alone).with_newer(calibration(plan, worker=shared))
    for together, worker in ((1, alone), (4, shared), (3, shared), (None, shared)):
        assert forecast.choose([both], plan, together) == Calibrated(both, worker)


# The commands


def test_plan_needs_neither_data_nor_runs_and_fits_80_columns(command, tmp_path):
    status, out, err = command("plan", "-p", "paper", "--runs-dir", tmp_path / "none")
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    text = " ".join(out.split())
    assert "Total: 240 runs, 24,000 epochs" in text
    assert "(the pair sam, sam+pof of a seed costs 300 epochs and not 500)" in text
    assert "training the shared stage once saves" in text
    assert "counted FLOPs at 35% of an A100's" in text
    assert not (tmp_path / "none").exists()
    figures = [line for line in out.splitlines() if "–" in line and "basis" not in line]
    assert len(figures) == 48
    assert all(line.rstrip().endswith("estimate") for line in figures)


def test_plan_shows_what_was_measured_and_what_runs_took(command, tmp_path):
    profile = profile_file(tmp_path)
    plan = make_plan(tmp_path)
    runs_dir = tmp_path / "runs"
    write_calibration(calibration_file(runs_dir, "a processor"), calibration(plan))
    plan.write(runs_dir / "plans" / "tiny.json")
    finish(Store(runs_dir), plan.runs[0], 10.0, seconds=123.0)
    status, out, _ = command("plan", "-p", profile, "--runs-dir", runs_dir, "--workers", "2,3")
    assert status == 0
    assert "estimate" not in out
    assert "Measured: on a processor, 1 thread a worker, 2 at once" in out
    lines = {" ".join(line.split()) for line in out.splitlines()}
    assert "sgd 0–2 1 2 12 s 12 s measured 1 2 min 03 s" in lines
    assert "sgd 2–3 1 1 6.0 s 6.0 s measured 0 –" in lines
    assert "Still to do: 4 runs" in out
    assert [line.split()[0] for line in out.splitlines()[-2:]] == ["2", "3"]


def test_plan_is_torch_free_where_everything_was_measured(tmp_path):
    plan = make_plan(tmp_path)
    runs_dir = tmp_path / "runs"
    write_calibration(calibration_file(runs_dir, "a processor"), calibration(plan))
    profile = profile_file(tmp_path)
    script = (
        "import sys; from benchmarks import cli; sys.argv[1:] = "
        f"['plan', '-p', {str(profile)!r}, '--runs-dir', {str(runs_dir)!r}]\n"
        "try: cli.main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True)


def test_what_costs_more_than_the_limit_is_refused_before_anything_is_started(command, tmp_path):
    profile = profile_file(tmp_path)
    plan = make_plan(tmp_path)
    runs_dir = tmp_path / "runs"
    slow = dict.fromkeys(STEPS, 600.0)  # 6 steps an epoch, 7 epochs: 7 h
    write_calibration(calibration_file(runs_dir, "a processor"), calibration(plan, steps=slow))
    arguments = ("plan", "-p", profile, "--runs-dir", runs_dir, "--max-gpu-hours")
    status, _, err = command(*arguments, 6.5)
    assert status == 1
    assert err.count("\n") == 1
    assert "predicted 7 worker-hours for 5 runs, more than the limit of 6.5" in err
    status, _, err = command(*arguments, 7.5)
    assert (status, err) == (0, "")


def test_reproduce_table_refuses_too_and_trains_nothing(command, tmp_path):
    profile = profile_file(tmp_path)
    runs_dir = tmp_path / "runs"
    folders = ("--runs-dir", runs_dir, "--results-dir", tmp_path / "results")
    limit = ("--max-gpu-hours", "0", "--device", "cpu")
    status, _, err = command(
        "reproduce-table", "-p", profile, *folders, *limit, "--data-dir", tmp_path / "data"
    )
    assert status == 1
    assert "(estimate) for 5 runs, more than the limit of 0" in err
    assert [path.name for path in runs_dir.iterdir()] == ["plans"]
    assert not (tmp_path / "results").exists()


def test_numbers_of_workers_are_checked(command, tmp_path):
    for wrong in ("0", "1,x", ""):
        status, _, err = command("plan", "--runs-dir", tmp_path, "--workers", wrong)
        assert status == 1
        assert "give numbers above 0" in err


# Afterwards


def test_predicted_stands_beside_actual(tmp_path):
    plan = make_plan(tmp_path)
    runs_dir = tmp_path / "runs"
    write_calibration(calibration_file(runs_dir, "a processor"), calibration(plan))
    store = Store(runs_dir)
    source = forecast.measured_here(read_calibrations(runs_dir), "a processor", WORKER)
    launch = forecast.before_launch(plan, store, source)
    on_cluster = forecast.before_launch(plan, store, source, jobs=jobs())
    for run in plan.runs:
        finish(store, run, 10.0, seconds=10.0)
    console = Console(width=80)
    with console.capture() as captured:
        console.print(forecast.after_sweep(launch, store, 40.0, 2))
        console.print(forecast.after_sweep(on_cluster, store, 42.0, 1))
        console.print(forecast.after_sweep(launch._replace(fresh=False), store, 4.0, 2))
    lines = {" ".join(line.split()) for line in captured.get().splitlines()}
    assert "sgd 0–2 1 12 s 10 s +20%" in lines
    assert "sgd 2–3 1 6.0 s 10 s -40%" in lines
    assert "whole sweep 5 36 s 40 s -10%" in lines  # the longest chain: SAM, SAM
    assert "whole sweep, 1 jobs at once 5 1 min 03 s 42 s +50%" in lines
    assert sum(line.startswith("whole sweep") for line in lines) == 2


def test_without_a_calibration_of_this_device_nothing_is_compared(tmp_path):
    plan = make_plan(tmp_path)
    runs_dir = tmp_path / "runs"
    assert forecast.before_launch(plan, Store(runs_dir), None) is None
    write_calibration(calibration_file(runs_dir, "another"), calibration(plan, device="another"))
    assert forecast.measured_here(read_calibrations(runs_dir), "a processor", WORKER) is None
    other = WorkerKind(threads=2, jobs=1)
    assert forecast.measured_here(read_calibrations(runs_dir), "another", other) is None


# The file


def test_a_calibration_is_read_as_it_was_written(tmp_path):
    written = calibration(make_plan(tmp_path), start=Start(process=1.5, loading={"digits": 0.25}))
    path = calibration_file(tmp_path, "NVIDIA A100-SXM4-80GB")
    assert path.name == "nvidia-a100-sxm4-80gb.json"
    write_calibration(path, written)
    assert read_calibration(path) == written


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"schema_version": 1, "device": "x"', "cannot be read as JSON"),
        ('{"schema_version": 1, "device": "x", "kind": "cpu", "starts": {}}', "measurements"),
        ('{"schema_version": 0}', "not a calibration of this version"),
        ("[]", "expected a JSON object"),
        ("\udce2", "cannot be read as JSON"),
    ],
)
def test_a_broken_calibration_is_one_clear_line(command, tmp_path, content, said):
    path = calibration_file(tmp_path, "x")
    path.parent.mkdir()
    path.write_bytes(content.encode(errors="surrogateescape"))
    status, _, err = command("plan", "-p", "smoke", "--runs-dir", tmp_path)
    assert status == 1
    assert err.count("\n") == 1
    assert str(path) in err
    assert said in err


def test_a_newer_measurement_takes_the_place_of_an_older_and_keeps_the_others(tmp_path):
    plan = make_plan(tmp_path)
    older = calibration(plan, start=Start(process=1.0, loading={"svhn": 7.0}))
    newer = calibration(plan, steps={"sam": 9.0}, start=Start(process=2.0, loading={"digits": 3}))
    both = older.with_newer(newer)
    steps = {m.key.algorithm: m.rates.step for m in both.measurements}
    assert steps == STEPS | {"sam": 9.0}
    assert both.start_of(WORKER) == Start(process=2.0, loading={"svhn": 7.0, "digits": 3})


def test_what_moves_a_step_is_part_of_its_key_and_what_does_not_is_not(tmp_path):
    def key(changes=None, method="sam+pof", worker=WORKER, torch="2"):
        plan = make_plan(tmp_path, changes)
        run = next(run for run in plan.runs if run.method == method)
        return key_of(run.settings, worker, torch)

    assert key() == key({"seeds": [7]}) == key({"sam": {"rho": 0.2}}) == key({"pof": {"gamma": 1}})
    different = [
        key({"training": {"batch_size": 50}}),
        key({"training": {"precision": "bf16"}}),
        key({"training": {"channels_last": False}}),
        key({"backbones": ["wrn_16_1"]}),
        key({"augmentations": ["basic"]}),
        key({"pof": {"range_batch_size": 50}}),
        key({"pof": {"search": "grid16"}}),
        key(method="sam"),
        key(worker=WorkerKind(2, 2)),
        key(worker=WorkerKind(1, 1)),
        key(torch="3"),
    ]
    assert all(key() != other for other in different)
    assert key({"sam": {"m_sharpness": 5}}, "sam") != key(method="sam")
