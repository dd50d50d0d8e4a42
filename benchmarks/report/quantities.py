"""The numbers that claims are about, of one run or of one row, by seed."""

from benchmarks.errors import UserError
from benchmarks.report.guards import Row
from benchmarks.report.measurements import Hessian, Ranges
from benchmarks.report.results import Results


def errors_at(results: Results, row: Row, *, epochs: int | None = None) -> dict[int, float]:
    """Test error in percent by seed, at the last epoch or after some of the second stage.

    Args:
        results: Of the profile.
        row: Whose.
        epochs: Of the second stage; seeds that were not evaluated there are left out.
    """
    found = {}
    for seed, identity in row.runs.items():
        settings = results.run(identity).settings
        if epochs is None or settings.first_epoch + epochs == settings.last_epoch:
            found[seed] = float(results.results[identity]["test_error"])
            continue
        for record in results.metrics[identity]:
            if record["epoch"] == settings.first_epoch + epochs and "test_error" in record:
                found[seed] = float(record["test_error"])
    return found


def hessians(results: Results, row: Row) -> dict[int, Hessian]:
    """The claims' Hessian by seed: the classifier's, on training images, without weight decay."""
    found = {}
    for seed, identity in row.runs.items():
        for measurement in results.measurements[identity]:
            if isinstance(measurement, Hessian) and (
                measurement.block,
                measurement.matrix,
                measurement.split,
                measurement.weight_decay,
            ) == ("classifier", "hessian", "train", 0.0):
                found[seed] = measurement
    return found


def top_eigenvalues(results: Results, row: Row) -> dict[int, float]:
    """The largest eigenvalue by seed; one that has not converged is left out."""
    tops = {s: hessian.top_eigenvalue for s, hessian in hessians(results, row).items()}
    return {seed: top for seed, top in tops.items() if top is not None}


def comparable_hessians(results: Results, row: Row, base: Row) -> None:
    """Refuse to compare eigenvalues measured on different images.

    Raises:
        UserError: They were.
    """
    others = hessians(results, base)
    for seed, hessian in hessians(results, row).items():
        if seed in others and others[seed].sample_sha256 != hessian.sample_sha256:
            run, other = results.run(row.runs[seed]), results.run(base.runs[seed])
            raise UserError(
                f"{run.label} and {other.label}: their Hessians were measured on different "
                "images; measure one of them again"
            )


def range_peaks(results: Results, row: Row, split: str) -> dict[int, float]:
    """Where ξ* piles up, by seed, on the network that the second stage starts from."""
    found = {}
    for seed, identity in row.runs.items():
        for measurement in results.measurements.get(start(results, identity), []):
            if isinstance(measurement, Ranges) and measurement.split == split:
                peak = measurement.peak
                if peak is not None:
                    found[seed] = peak
    return found


def start(results: Results, identity: str) -> str:
    """The run at the end of the first stage."""
    return results.lineage(identity)[0].identity
