"""The tables of test errors: a row a method in its setting, and paired differences."""

from collections.abc import Iterator, Mapping

import pandas as pd

from benchmarks.report.guards import Evidence, Row
from benchmarks.report.results import Results
from benchmarks.report.statistics import Summary, paired_difference, summarise

KEYS = ["dataset", "backbone", "augmentation", "method"]


def errors(results: Results, row: Row) -> dict[int, float]:
    """Test error in percent by seed, at the last epoch."""
    return {seed: float(results.results[i]["test_error"]) for seed, i in row.runs.items()}


def differences(evidence: Evidence) -> Iterator[tuple[Row, Row, dict[int, float]]]:
    """Post-trained row, base row, and the difference of their errors by seed, in points."""
    for row, base in evidence.pairs():
        treated, control = errors(evidence.results, row), errors(evidence.results, base)
        shared = sorted(treated.keys() & control.keys())
        yield row, base, {seed: treated[seed] - control[seed] for seed in shared}


def difference(evidence: Evidence, row: Row, base: Row) -> Summary:
    """Paired difference of test errors, row − base, in percentage points."""
    return paired_difference(errors(evidence.results, row), errors(evidence.results, base))


def errors_frame(evidence: Evidence) -> pd.DataFrame:
    """``errors.csv``: n, n_expected, mean, ci95, sd, and a column a seed, errors in percent."""
    return seed_table(evidence, [(row, {}, errors(evidence.results, row)) for row in evidence.rows])


def differences_frame(evidence: Evidence) -> pd.DataFrame:
    """``differences.csv``: the same for paired differences, in percentage points."""
    return seed_table(
        evidence,
        [(row, {"base": base.arm.method}, values) for row, base, values in differences(evidence)],
    )


def seed_table(
    evidence: Evidence, rows: list[tuple[Row, Mapping[str, object], dict[int, float]]]
) -> pd.DataFrame:
    """A table of means over seeds.

    Args:
        evidence: Of a profile.
        rows: Row, what else identifies it, and its values by seed.
    """
    seeds = evidence.results.plan.profile.seeds
    lines = []
    for row, more, values in rows:
        summary = summarise(list(values.values()))
        lines.append(
            {key: getattr(row.arm, key) for key in KEYS}
            | dict(more)
            | dict(row.split)
            | {
                "n": summary.n,
                "n_expected": len(seeds),
                "mean": summary.mean,
                "ci95": summary.ci95,
                "sd": summary.sd,
            }
            | {f"seed_{seed}": values.get(seed) for seed in seeds}
        )
    frame = pd.DataFrame(lines)
    return frame.astype({f"seed_{seed}": "float64" for seed in seeds}) if lines else frame
