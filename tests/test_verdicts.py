"""Verdicts from made-up sweeps of known truth, through the records on disk."""

import math

import pytest
from scipy import stats

from benchmarks.errors import UserError
from benchmarks.report import departures
from benchmarks.report.guards import weigh
from benchmarks.report.results import read
from benchmarks.report.verdicts import Verdict, findings, tally
from benchmarks.settings import load_profile
from tests.sweeps import Sweep, full_sweep

SHORT = {"epochs": 4, "post_epochs": 2, "batch_size": 256}
ONE = {"seeds": [0, 1, 2, 3], "datasets": ["cifar10"], "training": SHORT}
SAM = [2.70, 2.75, 2.66, 2.72]


def judged(sweep, claim):
    """Findings of one claim by data set."""
    return {f.dataset: f for f in findings(weigh(read(sweep.folder))) if f.claim.id == claim}


def with_differences(folder, differences, changes=None):
    """A sweep whose SAM+PoF errors are SAM's plus these, seed by seed, on every data set."""
    sweep = Sweep(folder, ONE | {"seeds": list(range(len(differences)))} | (changes or {}))
    for run in sweep.plan.runs:
        seed = run.settings.seed
        gain = differences[seed] if run.method == "sam+pof" else 0.0
        sweep.finish(run, round(SAM[seed] + gain, 4))
    return sweep


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([-0.20, -0.25, -0.18, -0.22], Verdict.REPRODUCED),
        ([0.20, 0.25, 0.18, 0.22], Verdict.CONTRADICTED),
        ([-0.20, 0.25, -0.18, 0.02], Verdict.INCONCLUSIVE),
        ([-0.20], Verdict.INCONCLUSIVE),
        ([-0.20, -0.20, -0.20], Verdict.INCONCLUSIVE),
    ],
)
def test_a_direction_is_decided_by_the_paired_interval(tmp_path, differences, verdict):
    finding = judged(with_differences(tmp_path, differences), "error")["cifar10"]
    assert finding.verdict is verdict
    assert finding.summary.n == finding.expected == len(differences)
    assert finding.estimate == pytest.approx(sum(differences) / len(differences))
    if len(set(differences)) > 1:
        interval = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
        assert finding.interval == pytest.approx((interval.low, interval.high), rel=1e-6)
        assert finding.p == pytest.approx(stats.ttest_1samp(differences, 0.0).pvalue, rel=1e-6)
    else:
        assert finding.reason in (
            "one seed has no interval",
            "all 3 seeds agree to the last digit: their spread cannot be estimated",
        )


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([0.01, -0.01, 0.02, 0.00], Verdict.REPRODUCED),
        ([-0.20, -0.25, -0.18, -0.22], Verdict.CONTRADICTED),
        ([-0.20, 0.25, -0.18, 0.02], Verdict.INCONCLUSIVE),
    ],
)
def test_not_lower_on_fashion_mnist_has_a_margin(tmp_path, differences, verdict):
    sweep = with_differences(tmp_path, differences, {"datasets": ["fashion_mnist"]})
    assert judged(sweep, "error")["fashion_mnist"].verdict is verdict


def test_holm_takes_back_what_one_of_four_settings_alone_would_decide(tmp_path):
    differences = [-0.18, -0.05, -0.13, -0.10]
    alone = judged(with_differences(tmp_path / "a", differences), "error")["cifar10"]
    four = {"datasets": ["cifar10", "cifar100", "svhn", "fashion_mnist"]}
    among = judged(with_differences(tmp_path / "b", differences, four), "error")
    assert 0.0125 < alone.p < 0.05
    assert alone.p == alone.p_holm
    assert alone.verdict is Verdict.REPRODUCED
    finding = among["cifar10"]
    assert finding.p == pytest.approx(alone.p)
    assert finding.p_holm == pytest.approx(4 * alone.p)
    assert finding.verdict is Verdict.INCONCLUSIVE
    assert "Holm's correction over 4 settings" in finding.reason


def with_tops(folder, ratios, *, spread=0.0, converged=True, sample=None):
    """A sweep whose SAM+PoF eigenvalues are these multiples of SAM's."""
    sweep = Sweep(folder, ONE | {"seeds": list(range(len(ratios)))})
    for run in sweep.plan.runs:
        sweep.finish(run, 2.7)
    for seed, ratio in enumerate(ratios):
        base = 1.0 + 0.3 * seed
        sweep.measure_hessian(sweep.final("sam", seed), base)
        more = {"sample_sha256": sample} if sample else {}
        run = sweep.final("sam+pof", seed)
        sweep.measure_hessian(run, base * ratio, converged=converged or seed > 0, **more)
    return sweep


@pytest.mark.parametrize(
    ("ratios", "halved", "lower"),
    [
        ([0.50, 0.47, 0.53, 0.51], Verdict.REPRODUCED, Verdict.REPRODUCED),
        ([0.80, 0.77, 0.83, 0.81], Verdict.CONTRADICTED, Verdict.REPRODUCED),
        ([1.20, 1.17, 1.23, 1.21], Verdict.CONTRADICTED, Verdict.CONTRADICTED),
        ([0.50, 0.27, 0.83, 0.41], Verdict.INCONCLUSIVE, Verdict.REPRODUCED),
    ],
)
def test_halved_is_a_value_and_smaller_a_direction(tmp_path, ratios, halved, lower):
    sweep = with_tops(tmp_path, ratios)
    finding = judged(sweep, "hessian")["cifar10"]
    assert finding.verdict is halved
    assert judged(sweep, "hessian-direction")["cifar10"].verdict is lower
    logs = [math.log(ratio) for ratio in ratios]
    interval = stats.ttest_1samp(logs, 0.0).confidence_interval(0.95)
    expected = (math.exp(interval.low), math.exp(interval.high))
    assert finding.interval == pytest.approx(expected, rel=1e-9)
    assert finding.estimate == pytest.approx(math.exp(sum(logs) / len(logs)))


def test_an_unconverged_eigenvalue_is_no_evidence(tmp_path):
    finding = judged(with_tops(tmp_path, [0.5, 0.47, 0.53], converged=False), "hessian")["cifar10"]
    assert (finding.summary.n, finding.expected) == (2, 3)
    assert set(finding.effects) == {1, 2}


def test_eigenvalues_on_different_images_are_not_compared(tmp_path):
    sweep = with_tops(tmp_path, [0.5, 0.47], sample="another")
    with pytest.raises(UserError, match="measured on different images"):
        judged(sweep, "hessian")


@pytest.mark.parametrize(
    ("peak", "verdict"), [(1.0, Verdict.REPRODUCED), (0.5, Verdict.CONTRADICTED)]
)
def test_the_ratio_of_peaks_is_taken_on_the_network_that_pof_starts_from(tmp_path, peak, verdict):
    sweep = Sweep(tmp_path, ONE)
    for run in sweep.plan.runs:
        sweep.finish(run, 2.7)
        if run.parent is None and run.method == "sam":
            sweep.measure_ranges(run, "train", 0.5, seed=run.settings.seed)
            sweep.measure_ranges(run, "test", peak, seed=run.settings.seed + 50)
    finding = judged(sweep, "range")["cifar10"]
    assert finding.summary.n == 4
    assert finding.verdict is verdict
    assert finding.estimate == pytest.approx(peak / 0.5, rel=0.1)


def test_early_looks_at_the_error_after_some_epochs_against_sams_last(tmp_path):
    long = {"epochs": 20, "post_epochs": 12, "batch_size": 256}
    sweep = Sweep(tmp_path, ONE | {"training": long})
    early = [-0.2, -0.3, -0.25, -0.22]
    for run in sweep.plan.runs:
        seed = run.settings.seed
        epochs = {30: SAM[seed] + early[seed]} if run.method == "sam+pof" else None
        sweep.finish(run, SAM[seed] + (0.5 if run.method == "sam+pof" else 0.0), epochs=epochs)
    finding = judged(sweep, "early")["cifar10"]
    assert finding.estimate == pytest.approx(sum(early) / 4)
    assert finding.verdict is Verdict.REPRODUCED
    short = with_differences(tmp_path / "short", [-0.2, -0.25])
    assert judged(short, "early")["cifar10"].verdict is Verdict.NOT_RUN
    assert "fewer than 10 epochs" in judged(short, "early")["cifar10"].reason


def test_what_is_not_there_is_not_run_and_says_why(tmp_path):
    sweep = Sweep(tmp_path, ONE | {"datasets": ["cifar10", "svhn"]}, unavailable={"svhn": "gone"})
    for run in sweep.plan.runs:
        if run.method == "sam":
            sweep.finish(run, 2.7)
    errors = judged(sweep, "error")
    assert {f.verdict for f in errors.values()} == {Verdict.NOT_RUN}
    assert errors["cifar10"].reason == "no run of sam+pof is done"
    assert errors["svhn"].reason == "the data could not be had: gone"
    assert errors["cifar100"].reason == "not in this profile"
    assert "not measured" in judged(sweep, "range")["cifar10"].reason


def test_a_sweep_that_follows_the_claims_reproduces_them_all(tmp_path):
    training = {"epochs": 200, "post_epochs": 50, "batch_size": 256, "precision": "bf16"}
    sweep = full_sweep(tmp_path, {"datasets": ["cifar10", "fashion_mnist"], "training": training})
    found = findings(weigh(read(sweep.folder)))
    there = [f for f in found if f.backbone]
    assert {f.verdict for f in there} == {Verdict.REPRODUCED}
    assert len(there) == 2 + 1 + 2 + 2 + 2 + 2 + 2
    assert tally(found)[Verdict.NOT_RUN] == len(found) - len(there) == 2 + 2 + 2
    assert all(f.departures == () for f in there)  # this is the paper's setting


def test_the_paper_profile_departs_from_itself_in_nothing():
    paper = load_profile("paper")
    assert all(departures.departures(paper, *cell) == [] for cell in paper.cells())


def test_settings_that_are_written_down_only_where_they_are_on_are_departures_too(tmp_path):
    training = {"compile": True, "gpus_per_run": 2}
    sweep = Sweep(tmp_path, ONE | {"training": {**SHORT, **training}})
    sweep.finish_all(lambda run: 2.5)
    found = departures.departures(sweep.plan.profile, "cifar10", "wrn_28_10", "basic")
    assert "training.compile True (profile paper: not set)" in found
    assert "training.gpus_per_run 2 (profile paper: not set)" in found
    assert judged(sweep, "error")["cifar10"].departures  # and the report is made


def test_departures_name_backbone_subset_epochs_and_data_copy(tmp_path):
    changes = {
        "datasets": ["cifar10_jpeg"],
        "backbones": ["wrn_10_1"],
        "augmentations": ["none"],
        "data": {"train_size": 1000},
        "training": {"epochs": 40, "post_epochs": 20, "batch_size": 64},
    }
    sweep = Sweep(tmp_path, ONE | changes)
    found = departures.departures(sweep.plan.profile, "cifar10_jpeg", "wrn_10_1", "none")
    assert found[:5] == [
        "data copy cifar10_jpeg (not cifar10 itself)",
        "backbone wrn_10_1 (paper: wrn_28_10)",
        "augmentation none (paper: basic, cutout)",
        "1,000 training images (paper: all training images)",
        "40 + 20 epochs (paper: 200 + 50)",
    ]
    assert "training.batch_size 64 (profile paper: 256)" in found
    # The copy's verdict is under its own name, and CIFAR-10 is not said to be missing.
    assert set(judged(sweep, "error")) == {"cifar10_jpeg", "cifar100", "svhn", "fashion_mnist"}
