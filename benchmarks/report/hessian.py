"""The table of Hessian eigenvalues: a row a method and measured block; only converged ones."""

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from benchmarks.report.errors import seed_table
from benchmarks.report.guards import Evidence, Row
from benchmarks.report.measurements import Hessian
from benchmarks.report.statistics import Summary, summarise


@dataclass(frozen=True)
class Line:
    """One row of the table.

    Attributes:
        row: Whose networks.
        block: Of which parameters.
        matrix: ``hessian`` or ``gauss-newton``.
        split: On whose images.
        weight_decay: λ where λI is in it.
        samples: Images measured on.
        tops: Seed → largest eigenvalue, where it converged.
        traces: Seed → trace.
        unconverged: Seeds whose largest eigenvalue did not converge.
    """

    row: Row
    block: str
    matrix: str
    split: str
    weight_decay: float
    samples: int
    tops: dict[int, float]
    traces: dict[int, float]
    unconverged: tuple[int, ...]

    @property
    def top(self) -> Summary:
        """Over seeds."""
        return summarise(list(self.tops.values()))

    @property
    def trace(self) -> Summary:
        """Over seeds."""
        return summarise(list(self.traces.values()))


def lines(evidence: Evidence) -> Iterator[Line]:
    """Every block that was measured on a row's final networks."""
    for row in evidence.rows:
        groups: dict[tuple[str, str, str, float, int], dict[int, Hessian]] = {}
        for seed, identity in row.runs.items():
            for m in evidence.results.measurements[identity]:
                if isinstance(m, Hessian):
                    key = (m.block, m.matrix, m.split, m.weight_decay, m.samples)
                    groups.setdefault(key, {})[seed] = m
        for key, by_seed in sorted(groups.items()):
            tops = {seed: hessian.top_eigenvalue for seed, hessian in by_seed.items()}
            traces = {seed: hessian.trace for seed, hessian in by_seed.items()}
            yield Line(
                row,
                *key,
                tops={seed: top for seed, top in tops.items() if top is not None},
                traces={seed: trace for seed, trace in traces.items() if trace is not None},
                unconverged=tuple(seed for seed, top in tops.items() if top is None),
            )


def hessian_frame(evidence: Evidence) -> pd.DataFrame:
    """``hessian.csv``: the largest eigenvalue, with the mean trace beside it."""
    return seed_table(
        evidence,
        [
            (
                line.row,
                {
                    "block": line.block,
                    "matrix": line.matrix,
                    "split": line.split,
                    "weight_decay": line.weight_decay,
                    "samples": line.samples,
                    "unconverged": len(line.unconverged),
                    "mean_trace": line.trace.mean,
                },
                line.tops,
            )
            for line in lines(evidence)
        ],
    )
