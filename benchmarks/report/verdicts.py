"""A verdict on every published claim in every setting of a profile, from the data alone."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from benchmarks.reference import Claim, Expectation, claims
from benchmarks.report import quantities, statistics
from benchmarks.report.departures import COPIES, departures
from benchmarks.report.guards import Evidence, Row
from benchmarks.report.results import Results
from benchmarks.report.statistics import ALPHA, NOTHING, Region, Summary


class Verdict(StrEnum):
    """What the data say of a claim."""

    REPRODUCED = "REPRODUCED"
    CONTRADICTED = "CONTRADICTED"
    INCONCLUSIVE = "INCONCLUSIVE"
    NOT_RUN = "NOT RUN"


UNDECIDED = (Verdict.INCONCLUSIVE, Verdict.NOT_RUN)


@dataclass(frozen=True)
class Finding:
    """A claim in one setting, and what came of it.

    Statistics are on the scale of the test: differences as they are, ratios as logarithms.

    Attributes:
        claim: What was claimed.
        expectation: What it says of this data set.
        dataset: Of the setting.
        backbone: Of the setting; empty where the profile has none of this data set.
        augmentation: Likewise.
        split: Field → value, where rows were split.
        effects: Seed → difference or log ratio.
        expected: Seeds planned.
        summary: Of the effects.
        p: Of the test that came closest to a verdict, before Holm's correction; NaN: no test.
        p_holm: The same after it.
        verdict: From ``p_holm``.
        reason: Why it is not a decision, or what decided; one sentence.
        departures: In what the setting differs from the paper's.
    """

    claim: Claim
    expectation: Expectation
    dataset: str
    backbone: str = ""
    augmentation: str = ""
    split: tuple[tuple[str, str], ...] = ()
    effects: Mapping[int, float] | None = None
    expected: int = 0
    summary: Summary = NOTHING
    p: float = math.nan
    p_holm: float = math.nan
    verdict: Verdict = Verdict.NOT_RUN
    reason: str = ""
    departures: tuple[str, ...] = ()

    @property
    def region(self) -> Region:
        """What the claim allows, on the scale of the test."""
        low, high = self.claim.bounds(self.expectation)
        if self.claim.comparison == "difference":
            return Region(low, high)
        return Region(math.log(low) if low > 0 else -math.inf, math.log(high))

    @property
    def setting(self) -> str:
        """The setting in a few words."""
        parts = [self.dataset, self.backbone, self.augmentation]
        return " ".join([p for p in parts if p] + [v for _, v in self.split])

    def natural(self, value: float) -> float:
        """A value of the test's scale on the claim's own."""
        return value if self.claim.comparison == "difference" else math.exp(value)

    @property
    def estimate(self) -> float:
        """Mean difference or geometric mean ratio."""
        return self.natural(self.summary.mean)

    @property
    def interval(self) -> tuple[float, float]:
        """95% t-interval, on the claim's own scale."""
        return self.natural(self.summary.low), self.natural(self.summary.high)

    @property
    def detectable(self) -> float:
        """The smallest true difference (as a ratio: factor above 1) this n finds in 80%."""
        return self.natural(statistics.detectable_difference(self.summary.sd, self.summary.n))

    @property
    def seeds_needed(self) -> int | None:
        """Seeds that decide in 80% of cases, if this mean and spread are the true ones."""
        return statistics.seeds_needed(self.summary.mean, self.summary.sd, self.region)


def findings(evidence: Evidence) -> list[Finding]:
    """Every claim in every setting, claims in their order, settings in the plan's."""
    return [finding for claim in claims() for finding in judge(claim, evidence)]


def judge(claim: Claim, evidence: Evidence) -> list[Finding]:
    """One claim in every setting; Holm's correction runs over those that could be tested."""
    found = [_test(finding) for finding in _settings(claim, evidence)]
    within = [_p(finding, inside=True) for finding in found]
    outside = [_p(finding, inside=False) for finding in found]
    adjusted_within, adjusted_outside = statistics.holm(within), statistics.holm(outside)
    tests = sum(not math.isnan(p) for p in within)
    return [
        _decide(*arguments, tests)
        for arguments in zip(
            found,
            zip(within, adjusted_within.tolist(), strict=True),
            zip(outside, adjusted_outside.tolist(), strict=True),
            strict=True,
        )
    ]


def _settings(claim: Claim, evidence: Evidence) -> Iterator[Finding]:
    """The settings that a claim speaks of, with the effects by seed."""
    plan = evidence.results.plan
    seen: set[str] = set()
    for row in evidence.rows:
        if row.arm.method != _carrier(claim):
            continue
        original = COPIES.get(row.arm.dataset, row.arm.dataset)
        expectation = claim.expectation(original)
        if expectation is None:
            continue
        seen.add(original)
        finding = Finding(
            claim,
            expectation,
            *row.cell,
            split=row.split,
            expected=len(plan.profile.seeds),
            departures=tuple(departures(plan.profile, *row.cell)),
        )
        yield _with_effects(finding, evidence, row)
    for expectation in claim.expect:
        for dataset in expectation.datasets:
            if dataset not in seen:
                yield Finding(claim, expectation, dataset, reason="not in this profile")
    if not seen and not any(e.datasets for e in claim.expect):
        yield Finding(
            claim, claim.expect[0], "any", reason=f"{_carrier(claim)} is not in this profile"
        )


def _carrier(claim: Claim) -> str:
    """The method whose rows are the claim's settings."""
    return "sam" if claim.quantity == "range_peak" else claim.treated


def _with_effects(finding: Finding, evidence: Evidence, row: Row) -> Finding:
    claim, results = finding.claim, evidence.results
    if claim.quantity == "range_peak":
        base: Row | None = row
    else:
        base = evidence.partner(row, claim.base)
    if base is None:
        return replace(finding, reason=f"{claim.base} is not in this profile")
    treated_values, base_values = _values(finding, results, row, base)
    shared = sorted(treated_values.keys() & base_values.keys())
    if claim.comparison == "difference":
        effects = {seed: treated_values[seed] - base_values[seed] for seed in shared}
    else:
        effects = {
            seed: math.log(treated_values[seed] / base_values[seed])
            for seed in shared
            if treated_values[seed] > 0 and base_values[seed] > 0
        }
    if effects:
        return replace(finding, effects=effects)
    return replace(finding, effects={}, reason=_why_not_run(finding, results, row, base))


def _values(
    finding: Finding, results: Results, row: Row, base: Row
) -> tuple[dict[int, float], dict[int, float]]:
    claim, epochs = finding.claim, finding.expectation.epochs
    if claim.quantity == "test_error":
        return (
            quantities.errors_at(results, row, epochs=epochs),
            quantities.errors_at(results, base, epochs=None),
        )
    if claim.quantity == "top_eigenvalue":
        quantities.comparable_hessians(results, row, base)
        return quantities.top_eigenvalues(results, row), quantities.top_eigenvalues(results, base)
    return (
        quantities.range_peaks(results, row, claim.treated),
        quantities.range_peaks(results, row, claim.base),
    )


def _why_not_run(finding: Finding, results: Results, row: Row, base: Row) -> str:
    unavailable = results.plan.unavailable.get(finding.dataset)
    if unavailable is not None:
        return f"the data could not be had: {unavailable}"
    for needed in (row, base):
        if not needed.runs:
            return f"no run of {needed.arm.method} is done"
    if finding.claim.quantity == "top_eigenvalue":
        measured = quantities.hessians(results, row) and quantities.hessians(results, base)
        return "no eigenvalue converged" if measured else "the Hessian was not measured"
    if finding.claim.quantity == "range_peak":
        return "the ranges ξ* were not measured, or too few of them are finite"
    epochs = finding.expectation.epochs
    settings = [results.run(i).settings for i in row.runs.values()]
    if epochs is not None and settings[0].last_epoch - settings[0].first_epoch < epochs:
        return f"PoF was trained for fewer than {epochs} epochs"
    return f"not evaluated after {epochs} epochs of PoF" if epochs else "no seed has both arms"


def _test(finding: Finding) -> Finding:
    return replace(finding, summary=statistics.summarise(list((finding.effects or {}).values())))


def _p(finding: Finding, *, inside: bool) -> float:
    summary = finding.summary
    test = statistics.p_within if inside else statistics.p_outside
    return float(test(summary.mean, summary.sd, summary.n, finding.region))


def _decide(
    finding: Finding, within: tuple[float, float], outside: tuple[float, float], tests: int
) -> Finding:
    n = finding.summary.n
    if n == 0:
        return finding
    if n == 1:
        reason = "one seed has no interval"
        return replace(finding, verdict=Verdict.INCONCLUSIVE, reason=reason)
    if math.isnan(within[0]):
        reason = f"all {n} seeds agree to the last digit: their spread cannot be estimated"
        return replace(finding, verdict=Verdict.INCONCLUSIVE, reason=reason)
    meets = within[0] <= outside[0]
    p, p_holm = within if meets else outside
    over = f" over {tests} settings" if tests > 1 else ""
    if p_holm <= ALPHA:
        verdict = Verdict.REPRODUCED if meets else Verdict.CONTRADICTED
        reason = f"the interval lies {'within' if meets else 'outside of'} what the claim allows"
    else:
        verdict = Verdict.INCONCLUSIVE
        reason = "the interval holds values that the claim allows and values that it does not"
        if p <= ALPHA:
            reason = f"undecided after Holm's correction{over} (p = {p_holm:.3f})"
    return replace(finding, p=p, p_holm=p_holm, verdict=verdict, reason=reason)


def tally(found: Sequence[Finding]) -> dict[Verdict, int]:
    """How many findings have which verdict, in the order of ``Verdict``."""
    return {verdict: sum(f.verdict is verdict for f in found) for verdict in Verdict}
