"""``seeds``: what this many seeds could have seen, and how many a decision would take."""

import math
from pathlib import Path

from benchmarks.reference import claim as find_claim
from benchmarks.report import statistics, words
from benchmarks.report.guards import weigh
from benchmarks.report.page import markdown
from benchmarks.report.results import read
from benchmarks.report.statistics import Region
from benchmarks.report.tables import Table
from benchmarks.report.verdicts import Finding, findings, judge


def seeds(folder: Path, *, claim: str | None = None, effect: float | None = None) -> str:
    """A table of the claims that have data.

    Args:
        folder: ``results/<profile>``.
        claim: One claim alone.
        effect: Ask about this true effect (points, or a ratio) instead of the mean found.

    Raises:
        UserError: There is no such claim, or a record is broken.
    """
    evidence = weigh(read(folder))
    found = judge(find_claim(claim), evidence) if claim else findings(evidence)
    shown = [finding for finding in found if finding.summary.n]
    if not shown:
        return "no claim has data here yet"
    table = Table(
        "seeds",
        "",
        ("claim", "setting", "verdict", "measured", "n", "detectable", "if truly", "seeds needed"),
        tuple(_line(finding, effect) for finding in shown),
    )
    return (
        f"{markdown(table)}\n\n"
        "detectable: the smallest true effect that n seeds find in 80% of cases.\n"
        "seeds needed: for a decision in 80% of cases, the spread being the one measured, which "
        "few seeds know only roughly; Holm's correction may ask for more."
    )


def _line(finding: Finding, effect: float | None) -> tuple[str, ...]:
    truly = finding.estimate if effect is None else effect
    return (
        finding.claim.id,
        finding.setting,
        str(finding.verdict),
        words.measured(finding),
        f"{finding.summary.n}/{finding.expected}",
        words.detectable(finding),
        words.number(truly, signed=finding.claim.comparison == "difference"),
        _needed(finding, truly),
    )


def _needed(finding: Finding, truly: float) -> str:
    ratio = finding.claim.comparison == "ratio"
    if ratio and truly <= 0:
        return "–"
    mean = math.log(truly) if ratio else truly
    region: Region = finding.region
    if not finding.summary.sd > 0:
        return "–"
    needed = statistics.seeds_needed(mean, finding.summary.sd, region)
    return f"> {statistics.MOST_SEEDS}" if needed is None else str(needed)
