"""Published numbers as data, each with its source."""

import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from benchmarks.settings import AugmentationName, DatasetName

_FOLDER = Path(__file__).parent


class Published(BaseModel):
    """A published mean and its interval, in percent."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mean: float
    ci95: Annotated[float, Field(ge=0)]


class PublishedError(BaseModel):
    """Published test errors of one setting."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: DatasetName
    backbone: str
    augmentation: AugmentationName
    sam: Published
    sgd: Published


class Reference(BaseModel):
    """One publication's numbers.

    Attributes:
        title: Short name.
        citation: Where the numbers stand.
        plus_minus: What its ± means.
        differs: What its setting has that this project's protocol does not.
        error: Its test errors.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    citation: str
    plus_minus: str
    differs: str
    error: list[PublishedError]


def sam_paper() -> Reference:
    """The table of the SAM paper."""
    return Reference.model_validate(tomllib.loads((_FOLDER / "sam_paper.toml").read_text()))
