"""What was measured on a finished run's network: ``runs/<run>/measurements/*.json``, checked."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.errors import UserError
from benchmarks.files import canonical_json, read_json, sha256
from benchmarks.report import ranges

SCHEMA = 1
FOLDER = "measurements"
_HEADER = ("kind", "identity", "checkpoint_sha256", "split", "samples", "sample_sha256")


@dataclass(frozen=True)
class Measurement:
    """One measurement.

    Attributes:
        file: Its name.
        kind: ``hessian``, ``range``, ….
        split: ``train`` or ``test``: the images it was made on.
        samples: How many.
        sample_sha256: Which.
        content: All that the file holds.
    """

    file: str
    kind: str
    split: str
    samples: int
    sample_sha256: str
    content: dict[str, Any]


@dataclass(frozen=True)
class Hessian(Measurement):
    """Extreme eigenvalues of a block's Hessian, largest first.

    Attributes:
        block: ``classifier``, ``network`` or a module's path.
        matrix: ``hessian`` or ``gauss-newton``.
        weight_decay: λ, if λI is in it; else 0.
        eigenvalues: The largest ones.
        residuals: ‖Hv − λv‖/λ of each.
        converged: Whether each is as exact as was asked.
        trace: Of the whole block, if it was measured.
    """

    block: str
    matrix: str
    weight_decay: float
    eigenvalues: tuple[float, ...]
    residuals: tuple[float, ...]
    converged: tuple[bool, ...]
    trace: float | None

    @property
    def top_eigenvalue(self) -> float | None:
        """The largest eigenvalue; ``None`` if it has not converged."""
        if not self.eigenvalues:
            return None
        index = max(range(len(self.eigenvalues)), key=self.eigenvalues.__getitem__)
        return self.eigenvalues[index] if self.converged[index] else None


@dataclass(frozen=True)
class Ranges(Measurement):
    """The perturbation ranges ξ* of a set, one a batch.

    Attributes:
        xi: Distances in the classifier's parameters.
        capped: Whether the loss still fell at the cap.
    """

    xi: tuple[float, ...]
    capped: tuple[bool, ...]

    @property
    def peak(self) -> float | None:
        """Where the ranges that have a finite minimiser pile up."""
        return ranges.peak(ranges.uncapped(self.xi, self.capped))


def read(folder: Path, result: dict[str, Any]) -> list[Measurement]:
    """The measurements of a run, by file name; none if it was not measured.

    Args:
        folder: Of the run.
        result: Of the run: what was measured must be its network.

    Raises:
        UserError: A file is broken, edited, of another version or of another network.
    """
    return [_read(path, result) for path in sorted((folder / FOLDER).glob("*.json"))]


def _read(path: Path, result: dict[str, Any]) -> Measurement:
    content = read_json(path)
    if content.get("schema") != SCHEMA:
        raise UserError(f"{path}: schema version {content.get('schema')}, this code reads {SCHEMA}")
    signed = {key: value for key, value in content.items() if key != "digest"}
    if content.get("digest") != sha256(canonical_json(signed)):
        raise UserError(f"{path}: its digest does not fit: the file was edited or damaged")
    missing = [key for key in _HEADER if key not in content]
    if missing:
        raise UserError(f"{path}: lacks {missing[0]}")
    for key in ("identity", "checkpoint_sha256"):
        if content[key] != result.get(key):
            raise UserError(f"{path}: measured on another network than this run's ({key} differs)")
    header = {
        "file": path.name,
        "kind": content["kind"],
        "split": content["split"],
        "samples": content["samples"],
        "sample_sha256": content["sample_sha256"],
        "content": content,
    }
    try:
        if content["kind"] == "hessian":
            return Hessian(
                **header,
                block=content["block"],
                matrix=content["matrix"],
                weight_decay=content["weight_decay"],
                eigenvalues=tuple(content["eigenvalues"]),
                residuals=tuple(content["residuals"]),
                converged=tuple(content["converged"]),
                trace=content.get("trace"),
            )
        if content["kind"] == "range":
            return Ranges(**header, xi=tuple(content["xi"]), capped=tuple(content["capped"]))
    except KeyError as error:
        raise UserError(f"{path}: lacks {error.args[0]}") from None
    return Measurement(**header)
