"""What post-training did to a network and on what terms: how far it went, and whether it ran away.

PoF presupposes a trained network and a small step: the published 50 epochs are 9,800 steps at
1.6e-4, so learning rate × steps is 1.6. A row far from that, or one whose ξ* and cosine grew, says
more about its terms than about PoF.
"""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from benchmarks.report import quantities
from benchmarks.report.errors import KEYS, differences
from benchmarks.report.guards import Evidence, Row
from benchmarks.report.results import Results
from benchmarks.report.statistics import summarise
from benchmarks.report.tables import Table, key, losses_before, setting, setting_header
from benchmarks.report.words import method_title, number, plus_minus

READING = (
    "The paper's protocol has rate × steps = 1.6 (9,800 steps at 1.6e-4). λ₁ ratio: the largest "
    "Hessian eigenvalue of the classifier over the base method's, geometric mean. ξ* (median over "
    "the batches not capped) and cos(ĝ, mean of gradients) are of the stage's first and last "
    "epoch: growing together they are a runaway."
)

_COLUMNS = {
    "rate_steps": "rate × steps",
    "loss_before": "training loss before",
    "loss_after": "after",
    "eigenvalue_ratio": "λ₁ ratio",
    "xi_first": "ξ* first",
    "xi_last": "last",
    "cosine_first": "cos(ĝ, mean) first",
    "cosine_last": "last",
    "capped": "capped",
    "ran_away": "ran away",
}


def frame(evidence: Evidence) -> pd.DataFrame:
    """``post-training.csv``: a row a post-trained arm, means over its seeds.

    ``rate_steps``: learning rate × steps (empty for a whole data set, whose size the records do
    not hold); ``loss_before``, ``loss_after``: training loss at the end of either stage;
    ``eigenvalue_ratio``: geometric mean of λ₁ over the base method's; ``xi_*``, ``cosine_*``: the
    first and the last epoch's median ξ* and mean cosine between ĝ and the running mean of
    gradients; ``capped``: share of ranges that reached the cap; ``ran_away``: runs of ``n``.
    """
    return pd.DataFrame(
        [
            {name: getattr(row.arm, name) for name in KEYS}
            | dict(row.split)
            | {"n": len(values)}
            | _values(evidence.results, row, base)
            for row, base, values in differences(evidence)
            if values
        ]
    )


def table(evidence: Evidence) -> Table:
    """The same for people, with the difference of errors."""
    rows, keys = [], []
    for row, base, errors in differences(evidence):
        if not errors:
            continue
        values = _values(evidence.results, row, base)
        digits = {"rate_steps": 3, "loss_before": 4, "loss_after": 4}
        rows.append(
            (
                *setting(row),
                method_title(row.arm.method),
                plus_minus(summarise(list(errors.values())), signed=True),
                *(number(values[name], digits.get(name, 2)) for name in list(_COLUMNS)[:-2]),
                f"{100 * values['capped']:.0f}%" if not math.isnan(values["capped"]) else "–",
                f"{values['ran_away']}/{len(errors)}",
            )
        )
        keys.append(key(row))
    header = (
        *setting_header(evidence),
        "method",
        "error − base's [pp]",
        *_COLUMNS.values(),
    )
    caption = "What post-training did: means over seeds; first and last epoch of the stage"
    return Table("post-training", caption, header, tuple(rows), tuple(keys))


def _values(results: Results, row: Row, base: Row) -> dict[str, Any]:
    identities = list(row.runs.values())
    tops, others = (quantities.top_eigenvalues(results, r) for r in (row, base))
    shared = [math.log(tops[s] / others[s]) for s in tops.keys() & others.keys()]

    def epoch(index: int, name: str) -> float:
        return _mean([results.metrics[i][index].get(name) for i in identities])

    return {
        "rate_steps": _mean([_rate_steps(results, i) for i in identities]),
        "loss_before": _mean(losses_before(results, row)),
        "loss_after": _mean([results.results[i]["train_loss"] for i in identities]),
        "eigenvalue_ratio": math.exp(_mean(shared)) if shared else math.nan,
        "xi_first": epoch(0, "xi_median"),
        "xi_last": epoch(-1, "xi_median"),
        "cosine_first": epoch(0, "cosine"),
        "cosine_last": epoch(-1, "cosine"),
        "capped": _mean([results.results[i].get("capped_share") for i in identities]),
        "ran_away": sum(bool(results.results[i].get("runaway")) for i in identities),
    }


def _rate_steps(results: Results, identity: str) -> float | None:
    settings = results.run(identity).settings
    if settings.data.train_size is None:
        return None
    steps = -(-settings.data.train_size // settings.batch_size)
    return steps * math.fsum(record["learning_rate"] for record in results.metrics[identity])


def _mean(values: Sequence[float | None]) -> float:
    """The mean of those that exist; NaN if none does."""
    found = [value for value in values if value is not None]
    return math.fsum(found) / len(found) if found else math.nan
