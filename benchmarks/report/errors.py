"""The table of test errors: a row a dataset × backbone × augmentation × method."""

from collections.abc import Iterable

import pandas as pd

from benchmarks.plan import Arm
from benchmarks.report.results import Results
from benchmarks.report.statistics import Summary, paired_difference, summarise

KEYS = ["dataset", "backbone", "augmentation", "method"]


def errors_frame(results: Results) -> pd.DataFrame:
    """``errors.csv``: n, n_expected, mean, ci95, sd, and a column a seed, errors in percent."""
    seeds = results.plan.profile.seeds
    rows = []
    for arm in results.plan.arms:
        errors = results.errors(arm)
        summary = summarise(list(errors.values()))
        rows.append(
            {key: getattr(arm, key) for key in KEYS}
            | {
                "n": summary.n,
                "n_expected": len(seeds),
                "mean": summary.mean,
                "ci95": summary.ci95,
                "sd": summary.sd,
            }
            | {f"seed_{seed}": errors.get(seed) for seed in seeds}
        )
    return pd.DataFrame(rows).astype({f"seed_{seed}": "float64" for seed in seeds})


def errors_csv(frame: pd.DataFrame) -> str:
    """The frame as text, the same for the same numbers on every machine."""
    return str(frame.to_csv(index=False, float_format="%.6f", lineterminator="\n"))


def paired_arms(arms: Iterable[Arm]) -> list[tuple[Arm, Arm]]:
    """(post-trained arm, its base arm) for every post-training method."""
    by_key = {(a.dataset, a.backbone, a.augmentation, a.method): a for a in arms}
    pairs = []
    for arm in by_key.values():
        base = arm.method.partition("+")[0]
        partner = by_key.get((arm.dataset, arm.backbone, arm.augmentation, base))
        if partner is not None and partner is not arm:
            pairs.append((arm, partner))
    return pairs


def difference(results: Results, arm: Arm, base: Arm) -> Summary:
    """Paired difference of test errors, arm − base, in percentage points."""
    return paired_difference(results.errors(arm), results.errors(base))
