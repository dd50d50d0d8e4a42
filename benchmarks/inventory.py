"""What this machine can provide for a profile: data sets with fingerprints, networks by name."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.assembly import load_dataset, training_size
from benchmarks.errors import UserError
from benchmarks.settings import Profile
from pof import data, network
from pof.errors import PofError


class Inventory(NamedTuple):
    """What was found.

    Attributes:
        fingerprints: Dataset → fingerprint.
        sources: Dataset → where it was found.
        unavailable: Dataset → why it could not be had and what to do.
    """

    fingerprints: dict[str, str]
    sources: dict[str, str]
    unavailable: dict[str, str]


def take(profile: Profile, data_dir: Path, tell: Callable[[str], None]) -> Inventory:
    """Look for every data set of a profile and check that its networks can be built.

    Args:
        profile: What is asked for.
        data_dir: Where data sets are, and where those that must be fetched go.
        tell: Takes a line for the user.

    Raises:
        UserError: A network does not exist or does not fit its images, or there are fewer
            images than asked for.
    """
    found = Inventory({}, {}, {})
    for name in profile.datasets:
        tell(f"looking for {name} …")
        try:
            dataset = load_dataset(name, data_dir)
        except UserError as error:
            found.unavailable[name] = str(error)
            tell(f"{name}: UNAVAILABLE: {error}")
            continue
        found.fingerprints[name] = dataset.fingerprint
        found.sources[name] = dataset.source
        tell(f"{name}: {dataset.source}, {dataset.fingerprint[:19]}…")
        for cell in profile.cells():
            if cell[0] == name:
                training_size(name, profile.cell(*cell).data, len(dataset.train))
        _check_networks(profile, dataset.info)
    return found


def _check_networks(profile: Profile, info: data.DatasetInfo) -> None:
    with torch.device("meta"):
        for dataset, backbone, augmentation in profile.cells():
            if dataset == info.name:
                settings = profile.cell(dataset, backbone, augmentation).network
                try:
                    network.create(
                        backbone,
                        num_classes=info.num_classes,
                        in_chans=info.channels,
                        img_size=info.image_size,
                        **settings.model_dump(),
                    )
                except PofError as error:
                    raise UserError(str(error)) from error
