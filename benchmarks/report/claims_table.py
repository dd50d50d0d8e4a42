"""``claims.csv``: every claim in every setting, with all that its verdict rests on."""

from collections.abc import Sequence

import pandas as pd

from benchmarks.report.verdicts import Finding


def claims_frame(found: Sequence[Finding]) -> pd.DataFrame:
    """A row a finding; effects on the claim's own scale."""
    return pd.DataFrame([_line(finding) for finding in found])


def _line(finding: Finding) -> dict[str, object]:
    claim = finding.claim
    low, high = claim.bounds(finding.expectation)
    interval = finding.interval
    return {
        "claim": claim.id,
        "dataset": finding.dataset,
        "backbone": finding.backbone,
        "augmentation": finding.augmentation,
        "split": " ".join(f"{field}={value}" for field, value in finding.split),
        "verdict": str(finding.verdict),
        "quantity": claim.quantity,
        "comparison": claim.comparison,
        "treated": claim.treated,
        "base": claim.base,
        "after_epochs": finding.expectation.epochs or "",
        "allowed_low": low,
        "allowed_high": high,
        "n": finding.summary.n,
        "n_expected": finding.expected,
        "estimate": finding.estimate,
        "ci95_low": interval[0],
        "ci95_high": interval[1],
        "p": finding.p,
        "p_holm": finding.p_holm,
        "detectable": finding.detectable,
        "seeds_needed": finding.seeds_needed or "",
        "reason": finding.reason,
        "differs_from_paper": "; ".join(finding.departures),
        "source": claim.source,
    }
