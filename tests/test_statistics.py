"""Tests, intervals, power and peaks against scipy, textbook values and made data of known truth."""

import math

import numpy as np
import pytest
from scipy import stats

from benchmarks.report import ranges
from benchmarks.report.statistics import (
    ALPHA,
    MOST_SEEDS,
    Region,
    detectable_difference,
    half_width,
    holm,
    p_outside,
    p_within,
    power,
    seeds_needed,
    summarise,
)

VALUES = [-0.21, -0.05, -0.34, -0.11, -0.02]
BELOW = Region(high=0.0)
SWEEPS = 2000


def moments(values):
    return np.mean(values, axis=-1), np.std(values, axis=-1, ddof=1)


def test_a_direction_is_the_two_sided_t_test():
    mean, sd = moments(VALUES)
    two_sided = stats.ttest_1samp(VALUES, 0.0).pvalue
    assert float(p_within(mean, sd, 5, BELOW)) == pytest.approx(two_sided, rel=1e-10)
    assert float(p_outside(mean, sd, 5, BELOW)) == 1.0
    assert float(p_outside(-mean, sd, 5, BELOW)) == pytest.approx(two_sided, rel=1e-10)


def test_a_value_takes_two_one_sided_tests():
    region = Region(-0.3, 0.1)
    mean, sd = moments(VALUES)
    above = stats.ttest_1samp(VALUES, -0.3, alternative="greater").pvalue
    below = stats.ttest_1samp(VALUES, 0.1, alternative="less").pvalue
    assert above != pytest.approx(below)
    assert float(p_within(mean, sd, 5, region)) == pytest.approx(2 * max(above, below), rel=1e-10)


@pytest.mark.parametrize("region", [BELOW, Region(low=-0.05), Region(-0.5, 0.2), Region(0.1, 0.3)])
@pytest.mark.parametrize("shift", [-0.4, -0.1, 0.0, 0.2, 0.35, 0.6])
def test_a_test_decides_exactly_where_the_interval_does(region, shift):
    summary = summarise([value + shift for value in VALUES])
    within = region.low < summary.low and summary.high < region.high
    outside = summary.high < region.low or region.high < summary.low
    arguments = (summary.mean, summary.sd, summary.n, region)
    assert (float(p_within(*arguments)) <= ALPHA) == within
    assert (float(p_outside(*arguments)) <= ALPHA) == outside


def test_without_a_spread_there_is_no_test():
    assert np.isnan(p_within(-1.0, math.nan, 1, BELOW))
    assert np.isnan(p_within(-1.0, 0.0, 3, BELOW))
    assert np.isnan(p_outside(-1.0, 0.0, 3, BELOW))


def test_holm_on_a_textbook_example_and_with_a_test_that_was_not_made():
    found = holm([0.01, 0.04, math.nan, 0.03, 0.005])
    assert found[[0, 1, 3, 4]].tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert math.isnan(found[2])
    rows = holm([[0.01, 0.02], [0.9, 0.6]])
    assert rows.tolist() == [pytest.approx([0.02, 0.02]), pytest.approx([1.0, 1.0])]


@pytest.mark.parametrize("n", [2, 3, 5])
def test_intervals_cover_the_truth_in_95_of_100_sweeps(n):
    """Errors of two arms with a common part, rounded to single images of 10,000."""
    draw = np.random.default_rng(n).standard_normal
    shared = 0.1 * draw((SWEEPS, 4, n))
    base = np.round(2.7 + shared + 0.08 * draw((SWEEPS, 4, n)), 2)
    treated = np.round(2.6 + shared + 0.08 * draw((SWEEPS, 4, n)), 2)
    mean, sd = moments(treated - base)
    covered = np.abs(mean + 0.1) <= half_width(sd, n)
    assert 0.93 <= covered.mean() <= 0.97


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize(
    ("region", "truth"),
    [
        (BELOW, [0.0, 0.0, 0.0, 0.0]),
        (BELOW, [0.0, 0.0, -0.6, -0.6]),
        (Region(math.log(0.4), math.log(0.625)), [math.log(0.4), math.log(0.625)] * 2),
    ],
)
def test_false_reproductions_stay_under_5_in_100_sweeps_of_four_data_sets(n, region, truth):
    """The truth is on the border of what is allowed, or (in two of four) what was claimed."""
    draw = np.random.default_rng(10 * n).standard_normal
    effects = np.asarray(truth)[:, None] + 0.1 * draw((SWEEPS, 4, n))
    mean, sd = moments(effects)
    p = p_within(mean, sd, n, region)
    false = ~np.array([region.holds(value) for value in truth])
    assert false.sum() >= 2
    corrected = holm(p) <= ALPHA
    assert corrected[:, false].mean() < 0.05
    assert corrected[:, false].any(axis=1).mean() < 0.05
    if false.all():
        # Four uncorrected chances would be too many: the correction is what keeps the promise.
        assert (p <= ALPHA).any(axis=1).mean() > 0.05


def test_power_is_what_a_simulation_finds():
    difference = detectable_difference(1.0, 5)
    mean, sd = moments(np.random.default_rng(0).normal(difference, 1.0, (20_000, 5)))
    found = (p_within(-mean, sd, 5, BELOW) <= ALPHA).mean()
    assert found == pytest.approx(0.8, abs=0.01)
    assert power(difference, 1.0, 5) == pytest.approx(0.8, abs=1e-6)
    assert detectable_difference(0.1, 5) == pytest.approx(0.1 * difference, rel=1e-6)


@pytest.mark.parametrize(("effect", "n"), [(1.0, 10), (0.5, 34), (0.8, 15)])
def test_seeds_needed_are_those_of_the_tables_for_a_paired_t_test(effect, n):
    assert seeds_needed(-effect, 1.0, BELOW) == n
    assert seeds_needed(effect, 1.0, BELOW) == n


def test_seeds_needed_at_the_border_or_without_a_spread_are_unknown():
    assert seeds_needed(0.0, 1.0, BELOW) is None
    assert seeds_needed(-1e-3, 1.0, BELOW) is None
    assert seeds_needed(-1.0, 0.0, BELOW) is None
    assert seeds_needed(math.nan, math.nan, BELOW) is None
    assert seeds_needed(-1e6, 1.0, BELOW) == 2
    assert 2 < seeds_needed(-0.1, 1.0, BELOW) < MOST_SEEDS


def test_a_region_of_two_bounds_needs_more_seeds_than_either_alone():
    both = seeds_needed(0.0, 0.2, Region(-0.2, 0.2))
    one = seeds_needed(0.0, 0.2, Region(high=0.2))
    mean, sd = moments(np.random.default_rng(1).normal(0.0, 0.2, (20_000, both)))
    found = (p_within(mean, sd, both, Region(-0.2, 0.2)) <= ALPHA).mean()
    assert both > one
    assert 0.8 <= found < 0.9


def test_the_density_is_scipys_at_the_same_bandwidth():
    values = np.random.default_rng(0).gamma(4.0, 0.2, 300)
    at = np.linspace(0.0, 3.0, 50)
    factor = ranges.bandwidth(values) / np.std(values, ddof=1)
    expected = stats.gaussian_kde(values, bw_method=factor)(at)
    assert ranges.density(values, at) == pytest.approx(expected, rel=1e-9)
    iqr = np.subtract(*np.quantile(values, [0.75, 0.25]))
    spread = min(np.std(values, ddof=1), iqr / 1.34)
    assert ranges.bandwidth(values) == pytest.approx(0.9 * spread * 300**-0.2)


def test_the_peak_is_the_mode_of_a_skewed_distribution_not_its_mean():
    draw = np.random.default_rng(3).standard_normal(4000)
    values = 0.5 * np.exp(0.5 * draw + 0.25)  # log-normal with mode 0.5, mean 0.73
    assert ranges.peak(values) == pytest.approx(0.5, rel=0.06)
    assert ranges.peak(2 * values) == pytest.approx(2 * ranges.peak(values), rel=1e-9)


def test_the_peak_of_few_or_of_equal_values():
    assert ranges.peak([1.0] * (ranges.FEWEST - 1)) is None
    assert ranges.peak([1.25] * ranges.FEWEST) == 1.25
    assert ranges.uncapped([1.0, 2.0, 3.0], [False, True, False]).tolist() == [1.0, 3.0]
