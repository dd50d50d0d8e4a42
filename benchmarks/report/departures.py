"""In what a profile's cell departs from the protocol of the paper."""

from collections.abc import Iterator
from functools import cache
from typing import Any

from benchmarks.settings import CellSettings, Profile, load_profile

# Copies of a data set that are not the data set itself.
COPIES = {"cifar10_jpeg": "cifar10"}


@cache
def _paper() -> Profile:
    return load_profile("paper")


def departures(profile: Profile, dataset: str, backbone: str, augmentation: str) -> list[str]:
    """What differs from the paper's protocol, the weightiest first; empty: nothing does."""
    paper = _paper()
    original = COPIES.get(dataset, dataset)
    lines = []
    if dataset in COPIES:
        lines.append(f"data copy {dataset} (not {original} itself)")
    elif original not in paper.datasets:
        lines.append(f"data set {dataset} (not one of the paper's)")
    if backbone not in paper.backbones:
        lines.append(f"backbone {backbone} (paper: {', '.join(paper.backbones)})")
    if augmentation not in paper.augmentations:
        lines.append(f"augmentation {augmentation} (paper: {', '.join(paper.augmentations)})")
    ours = profile.cell(dataset, backbone, augmentation)
    theirs = paper.cell(
        original if original in paper.datasets else paper.datasets[0],
        paper.backbones[0],
        augmentation if augmentation in paper.augmentations else paper.augmentations[0],
    )
    if ours.data.train_size != theirs.data.train_size:
        lines.append(f"{_images(ours)} (paper: {_images(theirs)})")
    if ours.data.holdout:
        lines.append(f"evaluated on {ours.data.holdout:,} held-out training images")
    epochs = (ours.training.epochs, ours.training.post_epochs)
    paper_epochs = (theirs.training.epochs, theirs.training.post_epochs)
    if epochs != paper_epochs:
        lines.append("{} + {} epochs".format(*epochs) + " (paper: {} + {})".format(*paper_epochs))
    return lines + [
        f"{key} {mine} (profile paper: {other})"
        for key, mine, other in _leaves(ours, theirs)
        if mine != other
    ]


def _images(cell: CellSettings) -> str:
    size = cell.data.train_size
    return f"{size:,} training images" if size else "all training images"


def _leaves(ours: CellSettings, theirs: CellSettings) -> Iterator[tuple[str, Any, Any]]:
    """Every other setting that can move a number, side by side."""
    said = {"data", "training.epochs", "training.post_epochs", "training.evaluate_every"}
    mine, other = ours.model_dump(mode="json"), theirs.model_dump(mode="json")
    for table in mine:
        for key in mine[table] | other[table]:  # some are written down only where they are on
            name = f"{table}.{key}"
            if table not in said and name not in said and name != "augmentation.kind":
                values = [cell[table].get(key, "not set") for cell in (mine, other)]
                yield name, *values
