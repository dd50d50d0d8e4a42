"""How names and numbers are written wherever people read them."""

import math
from collections.abc import Sequence

from benchmarks.report.statistics import Summary
from benchmarks.report.verdicts import Finding

_NAMES = {"sgd": "SGD", "sam": "SAM"}


def method_title(method: str) -> str:
    """``sam+pof-centred`` as people write it: SAM+PoF-centred."""
    base, _, variant = method.partition("+")
    second = "+" + variant.replace("pof", "PoF") if variant else ""
    return _NAMES[base] + second


def plus_minus(summary: Summary, digits: int = 2, *, signed: bool = False) -> str:
    """``15.23 ± 0.31``; without an interval below two seeds, – without any."""
    if summary.n == 0:
        return "–"
    mean = number(summary.mean, digits, signed=signed)
    return mean if math.isnan(summary.ci95) else f"{mean} ± {summary.ci95:.{digits}f}"


def number(value: float, digits: int = 2, *, signed: bool = False) -> str:
    """A number with a true minus sign; – where there is none."""
    if math.isnan(value):
        return "–"
    return f"{value:{'+' if signed else ''}.{digits}f}".replace("-", "−")


def mean(values: Sequence[float], digits: int = 4) -> str:
    """The mean of values; – of none."""
    return f"{math.fsum(values) / len(values):.{digits}f}" if values else "–"


def allowed(finding: Finding) -> str:
    """What the claim allows: ``< 0 pp``, ``≥ −0.05 pp``, ``0.4 to 0.625``."""
    low, high = finding.claim.bounds(finding.expectation)
    unit = " pp" if finding.claim.comparison == "difference" else ""
    least = -math.inf if finding.claim.comparison == "difference" else 0.0
    if low <= least:
        return f"< {high:g}{unit}"
    if math.isinf(high):
        return f"> {low:g}{unit}".replace("-", "−")
    return f"{low:g} to {high:g}{unit}"


def compared(finding: Finding) -> str:
    """What is compared, as a short formula."""
    claim = finding.claim
    if claim.quantity == "range_peak":
        return f"peak of ξ*, {claim.treated} / {claim.base}"
    treated, base = method_title(claim.treated), method_title(claim.base)
    if finding.expectation.epochs:
        treated += f" after {finding.expectation.epochs} epochs of PoF"
    sign = "−" if claim.comparison == "difference" else "/"
    what = {"test_error": "test error", "top_eigenvalue": "λ₁"}[claim.quantity]
    return f"{what}, {treated} {sign} {base}"


def measured(finding: Finding) -> str:
    """Estimate and interval: ``−0.28 [−0.51, −0.05] pp``."""
    if finding.summary.n == 0:
        return "–"
    difference = finding.claim.comparison == "difference"
    estimate = number(finding.estimate, signed=difference)
    unit = " pp" if difference else ""
    if finding.summary.n == 1:
        return f"{estimate}{unit}"
    low, high = (number(bound, signed=difference) for bound in finding.interval)
    return f"{estimate} [{low}, {high}]{unit}"


def detectable(finding: Finding) -> str:
    """The smallest effect that this n could have found."""
    value = finding.detectable
    if math.isnan(value):
        return "–"
    if finding.claim.comparison == "difference":
        return f"{value:.2f} pp"
    return f"factor {value:.2f}"


def seeds(finding: Finding) -> str:
    """How many seeds a decision would take."""
    if math.isnan(finding.summary.sd) or finding.summary.sd == 0:
        return "–"
    return "> 1000" if finding.seeds_needed is None else str(finding.seeds_needed)
