"""Published numbers and claims as data, each with its source."""

import math
import tomllib
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from benchmarks.errors import UserError
from benchmarks.settings import DatasetName, Strict, explain

_FOLDER = Path(__file__).parent

Quantity = Literal["test_error", "top_eigenvalue", "range_peak"]


class Published(Strict):
    """A published mean, in percent.

    Attributes:
        mean: The number.
        ci95: Its ±; ``None`` where none is given.
        below: Whether the publication says only that the ± is less than that.
    """

    mean: float
    ci95: Annotated[float, Field(ge=0)] | None = None
    below: bool = False

    def __str__(self) -> str:
        if self.ci95 is None:
            return f"{self.mean:g}"
        return f"{self.mean:g} ± {'<' if self.below else ''}{self.ci95:g}"


class PublishedErrors(Strict):
    """Published test errors of one setting.

    Attributes:
        dataset: As this project calls it, where it has it.
        backbone: Likewise.
        augmentation: Likewise.
        epochs: Where they differ from those of the whole publication.
        differs: What else does.
        errors: Method → number; empty: not at hand.
    """

    dataset: str
    backbone: str
    augmentation: str
    epochs: int | None = None
    differs: str = ""
    errors: dict[str, Published] = Field(default={})


class Reference(Strict):
    """One publication's numbers.

    Attributes:
        title: Short name.
        citation: Where the numbers stand.
        plus_minus: What its ± means.
        n: Runs behind each number; ``None``: not stated.
        differs: What its setting has that this project's protocol does not.
        epochs: How many it trained; a shorter training is not the same setting.
        batch_size: Images a batch.
        note: For whoever edits the file.
        error: Its test errors.
    """

    title: str
    citation: str
    plus_minus: str
    n: int | None = None
    differs: str = ""
    epochs: int | None = None
    batch_size: int | None = None
    note: str = ""
    error: list[PublishedErrors]

    def find(self, dataset: str, backbone: str, augmentation: str, method: str) -> Published | None:
        """The number of a method in the publication's main setting."""
        for row in self.error:
            same = (row.dataset, row.backbone, row.augmentation, row.epochs)
            if same == (dataset, backbone, augmentation, None) and method in row.errors:
                return row.errors[method]
        return None


class Expectation(Strict):
    """What a claim expects on some data sets.

    Attributes:
        datasets: Empty: on all.
        direction: ``lower``, ``not lower`` or ``about``.
        value: What is met: 0 for a direction of a difference, 1 for one of a ratio, or the
            claimed value.
        margin: Within which the value counts as met: an amount for a difference, a factor for a
            ratio.
        why_margin: Where the margin comes from.
        epochs: Of the second stage, after which the treated arm is looked at; ``None``: all.
    """

    datasets: list[DatasetName] = Field(default=[])
    direction: Literal["lower", "not lower", "about"]
    value: float
    margin: float
    why_margin: str
    epochs: Annotated[int, Field(gt=0)] | None = None


class Claim(Strict):
    """A published claim.

    Attributes:
        id: Short name.
        statement: In one sentence.
        source: Where it stands.
        n: Runs behind it; ``None``: not stated.
        plus_minus: What the ± of its numbers means.
        reading: How this project reads it where the source leaves it open.
        quantity: What is compared: the test error in percent, the largest eigenvalue of the
            classifier's Hessian on the training images, or the peak of the ranges ξ*.
        comparison: ``difference`` (treated − base) or ``ratio`` (treated / base).
        treated: Method, or for ``range_peak`` the split.
        base: The same; paired by seed.
        expect: On which data sets what.
    """

    id: str
    statement: str
    source: str
    n: int | None = None
    plus_minus: str
    reading: str = ""
    quantity: Quantity
    comparison: Literal["difference", "ratio"]
    treated: str
    base: str
    expect: Annotated[list[Expectation], Field(min_length=1)]

    @model_validator(mode="after")
    def _can_be_met(self) -> Self:
        for expectation in self.expect:
            least = 0.0 if self.comparison == "difference" else 1.0
            if expectation.margin < least:
                raise ValueError(f"margin of a {self.comparison} must be at least {least:g}")
            if expectation.direction == "about" and expectation.margin == least:
                raise ValueError("'about' needs a margin")
        return self

    def expectation(self, dataset: str) -> Expectation | None:
        """What the claim says of a data set; ``None``: nothing."""
        for expectation in self.expect:
            if not expectation.datasets or dataset in expectation.datasets:
                return expectation
        return None

    def bounds(self, expectation: Expectation) -> tuple[float, float]:
        """The values that the claim allows, on the claim's own scale."""
        value, margin = expectation.value, expectation.margin
        if self.comparison == "difference":
            low, high = value - margin, value + margin
        else:
            low, high = value / margin, value * margin
        least = -math.inf if self.comparison == "difference" else 0.0
        if expectation.direction == "lower":
            return least, high
        return (low, math.inf) if expectation.direction == "not lower" else (low, high)


class _Claims(Strict):
    claim: list[Claim]


def _load(name: str) -> dict[str, Any]:
    return tomllib.loads((_FOLDER / f"{name}.toml").read_text())


def _reference(name: str) -> Reference:
    try:
        return Reference.model_validate(_load(name))
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise _broken(name, error) from error


def _broken(name: str, error: Exception) -> UserError:
    reason = explain(error) if isinstance(error, ValidationError) else str(error)
    return UserError(f"{_FOLDER / name}.toml: {reason}")


@cache
def sam_paper() -> Reference:
    """The table of the SAM paper."""
    return _reference("sam_paper")


@cache
def poster_background() -> Reference:
    """The table on the poster's background panel: SAM on EfficientNet-B7."""
    return _reference("poster_background")


@cache
def pof_paper() -> Reference:
    """The PoF paper's own table: its rows, with the cells that are at hand."""
    return _reference("pof_paper")


@cache
def claims() -> tuple[Claim, ...]:
    """Every claim, in order.

    Raises:
        UserError: The file is broken.
    """
    try:
        return tuple(_Claims.model_validate(_load("claims")).claim)
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise _broken("claims", error) from error


def claim(name: str) -> Claim:
    """One claim.

    Raises:
        UserError: There is none of that name.
    """
    known = {c.id: c for c in claims()}
    if name not in known:
        raise UserError(f"no claim {name!r}; there are: {', '.join(known)}")
    return known[name]
