"""A profile as validated data: which runs a sweep has and every setting that moves its numbers.

Profiles are TOML files; anything unknown, of the wrong type or impossible is refused with one
line that names the file, the key and what is allowed.
"""

import difflib
import itertools
import json
import math
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from benchmarks.errors import UserError
from pof.settings import (
    AugmentationSettings,
    OptimizerSettings,
    PoFSettings,
    SAMSettings,
    ScheduleSettings,
)

PROFILES = Path(__file__).parent / "profiles"

DatasetName = Literal["cifar10", "cifar100", "svhn", "fashion_mnist", "digits", "cifar10_jpeg"]
AugmentationName = Literal["none", "basic", "cutout"]
BaseMethod = Literal["sgd", "sam"]
VariantName = Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")]

# Post-training methods that every profile knows, as differences from its [pof] table.
VARIANTS: dict[str, dict[str, Any]] = {
    "pof": {},
    "pof-centred": {"direction": "centred"},
    "frozen": {"gamma": 0.0},
}


class Strict(BaseModel):
    """No unknown keys, no coercion, no change after validation."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


# A setting that is written down only where it is on: without it, a run is what it always was.
OffUnlessSaid = Annotated[bool, Field(exclude_if=lambda on: not on)]
OneUnlessSaid = Annotated[int, Field(gt=0, exclude_if=lambda count: count == 1)]


class DataSettings(Strict):
    """Which images are trained and tested on.

    Attributes:
        train_size: Training images, drawn at random from the training set; ``None``: all.
        subset_seed: Of that draw.
        holdout: If above 0, this many training images are held out and *they* are what is
            evaluated instead of the test set: for choosing settings without looking at it.
    """

    train_size: Annotated[int, Field(gt=0)] | None = None
    subset_seed: int = 0
    holdout: Annotated[int, Field(ge=0)] = 0


class NetworkSettings(Strict):
    """How a backbone is built; see ``pof.network.create``."""

    stem: Literal["standard", "small"] = "standard"
    stride: Literal["standard", "authors"] = "standard"
    classifier_init: Literal["standard", "authors"] = "standard"


class TrainingSettings(Strict):
    """Length and arithmetic of training.

    Attributes:
        epochs: Of the first stage (SGD or SAM), which every arm shares.
        post_epochs: Of the second: PoF, or the base method continued.
        batch_size: Images a batch.
        precision: ``fp32``, or ``bf16``: autocast, weights kept in fp32.
        channels_last: Memory format of images and weights.
        compile: Whether the feature extractor is compiled (``torch.compile``): faster steps after
            a minute's wait at the start of a run. It moves rounding, and the same bits at every
            start are not promised; runs say so.
        gpus_per_run: Processes that share every batch of a run, a GPU each (on a CPU, cores).
            With ``sam.m_sharpness = batch_size / gpus_per_run`` each of them ascends on its own,
            as the published SAM runs did; without, all ascend together.
        sync_batchnorm: Whether BatchNorm normalises over all of them (GPUs only; not with
            ``sam.m_sharpness``) or within each.
        evaluate_every: Epochs between evaluations; the last epoch always is. It changes what is
            recorded, not what is trained.
    """

    epochs: Annotated[int, Field(gt=0)] = 200
    post_epochs: Annotated[int, Field(ge=0)] = 50
    batch_size: Annotated[int, Field(gt=0)] = 256
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = True
    compile: OffUnlessSaid = False
    gpus_per_run: OneUnlessSaid = 1
    sync_batchnorm: OffUnlessSaid = False
    evaluate_every: Annotated[int, Field(gt=0)] = 1


class Where(Strict):
    """Which cells of the sweep an override applies to: all that match every key given."""

    dataset: DatasetName | None = None
    backbone: str | None = None
    augmentation: AugmentationName | None = None

    @model_validator(mode="after")
    def _names_something(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("names no dataset, backbone or augmentation")
        return self

    def matches(self, dataset: str, backbone: str, augmentation: str) -> bool:
        """Whether this override applies to a cell."""
        return (
            self.dataset in (None, dataset)
            and self.backbone in (None, backbone)
            and self.augmentation in (None, augmentation)
        )


class Continued(Strict):
    """The base method continued on terms of its own: what post-training must beat at equal cost.

    Attributes:
        learning_rate: A constant rate; ``None``: the schedule continues.
        epochs: How many; ``None``: as many as the other arms (``training.post_epochs``).
    """

    learning_rate: Annotated[float, Field(gt=0)] | None = None
    epochs: Annotated[int, Field(gt=0)] | None = None


class CellSettings(Strict):
    """Everything that is fixed for one dataset × backbone × augmentation."""

    data: DataSettings = DataSettings()
    network: NetworkSettings = NetworkSettings()
    training: TrainingSettings = TrainingSettings()
    augmentation: AugmentationSettings = AugmentationSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    sam: SAMSettings = SAMSettings()
    pof: PoFSettings = PoFSettings()

    @model_validator(mode="after")
    def _hangs_together(self) -> Self:
        total = self.training.epochs + self.training.post_epochs
        if self.schedule.kind == "cosine" and self.schedule.total_epochs != total:
            raise ValueError(
                f"schedule.total_epochs must be epochs + post_epochs = {total} for a cosine"
            )
        if self.training.gpus_per_run > self.training.batch_size:
            raise ValueError("training.gpus_per_run exceeds training.batch_size")
        if self.training.sync_batchnorm and self.training.gpus_per_run == 1:
            raise ValueError("training.sync_batchnorm needs training.gpus_per_run above 1")
        m = self.sam.m_sharpness
        if m is not None and self.training.sync_batchnorm:
            raise ValueError(
                "training.sync_batchnorm contradicts sam.m_sharpness, whose parts are normalised "
                "each on its own; leave one out"
            )
        if m is not None and -(-self.training.batch_size // m) < self.training.gpus_per_run:
            raise ValueError(
                f"sam.m_sharpness {m} makes fewer parts of a batch of {self.training.batch_size} "
                f"than training.gpus_per_run {self.training.gpus_per_run}; lower it"
            )
        size = self.data.train_size
        if size is not None and size < self.training.batch_size:
            raise ValueError(
                f"training.batch_size {self.training.batch_size} exceeds data.train_size {size}"
            )
        return self


class Override(Strict):
    """Settings of some cells, as differences from the profile's own tables."""

    where: Where
    data: dict[str, Any] = {}
    network: dict[str, Any] = {}
    training: dict[str, Any] = {}
    augmentation: dict[str, Any] = {}
    optimizer: dict[str, Any] = {}
    schedule: dict[str, Any] = {}
    sam: dict[str, Any] = {}
    pof: dict[str, Any] = {}


class Profile(CellSettings):
    """One sweep: the grid, the settings of its cells, and what differs for some of them.

    Attributes:
        title: A line for people.
        description: What this profile is for and how its settings were chosen.
        seeds: One run an arm and seed; arms are paired by seed.
        datasets: See ``DatasetName``.
        backbones: Names that ``pof.network.create`` knows.
        augmentations: See ``AugmentationSettings``.
        methods: ``sgd``, ``sam``, or ``BASE+VARIANT`` with a variant of ``VARIANTS``, of
            ``variants`` or of ``continued``.
        variants: More post-training methods: name → what differs from ``pof``, and ``epochs``, if
            it ends before ``training.post_epochs`` are over.
        continued: More second stages of the base method itself: name → its terms.
        override: What differs for some cells.
    """

    title: str
    description: str = ""
    seeds: Annotated[list[int], Field(min_length=1)]
    datasets: Annotated[list[DatasetName], Field(min_length=1)]
    backbones: Annotated[list[str], Field(min_length=1)]
    augmentations: Annotated[list[AugmentationName], Field(min_length=1)]
    methods: Annotated[list[str], Field(min_length=1)]
    variants: dict[VariantName, dict[str, Any]] = {}
    continued: dict[VariantName, Continued] = {}
    override: list[Override] = []

    @model_validator(mode="after")
    def _methods_exist(self) -> Self:
        known = [*VARIANTS, *self.variants, *self.continued]
        for table, earlier in (
            ("variants", VARIANTS.keys()),
            ("continued", VARIANTS.keys() | self.variants.keys()),
        ):
            if taken := earlier & getattr(self, table).keys():
                name = min(taken)
                raise ValueError(f"{table}: {name!r} already means something; choose a new name")
        for method in self.methods:
            base, plus, variant = method.partition("+")
            if base not in ("sgd", "sam"):
                raise ValueError(f"methods: {method!r} must begin with sgd or sam")
            if plus and variant not in known:
                raise ValueError(
                    f"methods: no variant {variant!r} in {method!r}; known: {', '.join(known)}"
                )
        for name in ("seeds", "datasets", "backbones", "augmentations", "methods"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: a value is listed twice")
        return self

    def cells(self) -> list[tuple[str, str, str]]:
        """Every dataset × backbone × augmentation of the grid."""
        return list(itertools.product(self.datasets, self.backbones, self.augmentations))

    def cell(self, dataset: str, backbone: str, augmentation: str) -> CellSettings:
        """The settings of one cell, overrides applied in order."""
        tables = {name: self.model_dump(mode="json")[name] for name in CellSettings.model_fields}
        for override in self.override:
            if override.where.matches(dataset, backbone, augmentation):
                for name in tables:
                    tables[name] |= getattr(override, name)
        tables["augmentation"]["kind"] = augmentation
        return CellSettings.model_validate_json(json.dumps(tables))

    def pof_variant(self, name: str, cell: CellSettings) -> PoFSettings:
        """The PoF settings of a post-training method in a cell."""
        base = TypeAdapter(PoFSettings).dump_python(cell.pof, mode="json")
        changed = base | (VARIANTS | self.variants)[name]
        changed.pop("epochs", None)
        return TypeAdapter(PoFSettings).validate_json(json.dumps(changed))

    def variant_epochs(self, name: str, cell: CellSettings) -> int:
        """How long a post-training method trains in a cell."""
        epochs: int = self.variants.get(name, {}).get("epochs", cell.training.post_epochs)
        return epochs


def load_profile(name: str) -> Profile:
    """Read and check a profile.

    Args:
        name: A name in ``benchmarks/profiles``, or the path of a TOML file.

    Raises:
        UserError: There is no such profile, or something in it is wrong.
    """
    path = _profile_path(name)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: cannot be read as TOML ({error})") from error
    for key, value in _leaves(tables):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{path}: {key}: must be a finite number (found {value})")
        if key.endswith("augmentation.kind"):
            raise UserError(f"{path}: {key}: say it in the list 'augmentations'")
    where = ""
    try:
        profile = Profile.model_validate_json(json.dumps(tables, default=str))
        for index, override in enumerate(profile.override):
            if not any(override.where.matches(*cell) for cell in profile.cells()):
                raise UserError(f"{path}: override.{index}.where: matches no cell of this profile")
        for names in profile.cells():
            where = "with the overrides of " + " ".join(names) + ": "
            cell = profile.cell(*names)
            if cell.data.holdout != profile.data.holdout:
                raise UserError(f"{path}: {where}data.holdout: must be the same for every cell")
            if not cell.training.post_epochs and any("+" in method for method in profile.methods):
                raise UserError(
                    f"{path}: {where}training.post_epochs: must be above 0, "
                    "since a method post-trains"
                )
            for variant, changes in profile.variants.items():
                unknown = set(changes) - set(PoFSettings.__dataclass_fields__) - {"epochs"}
                if unknown:
                    raise UserError(
                        f"{path}: variants.{variant}.{min(unknown)}: unknown key; "
                        f"allowed here: {', '.join(_allowed_keys(('pof', '')))}, epochs"
                    )
                epochs = changes.get("epochs", 1)
                if type(epochs) is not int or not 1 <= epochs <= max(1, cell.training.post_epochs):
                    raise UserError(
                        f"{path}: variants.{variant}.epochs: must be a whole number from 1 to "
                        f"training.post_epochs (found {epochs!r})"
                    )
                where = f"variants.{variant}: "
                profile.pof_variant(variant, cell)
    except ValidationError as error:
        raise UserError(f"{path}: {where}{explain(error)}") from error
    return profile


def profile_name(name: str) -> str:
    """What a profile's results are filed under."""
    return Path(name).stem if name.endswith(".toml") else name


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested tables and lists that is neither, with its dotted key."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, inner in items:
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _profile_path(name: str) -> Path:
    if name.endswith(".toml"):
        if not Path(name).is_file():
            raise UserError(f"{name}: no such file")
        return Path(name)
    path = PROFILES / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in PROFILES.glob("*.toml")))
        raise UserError(
            f"no profile {name!r}; there are: {known} (or give the path of a TOML file)"
        )
    return path


def explain(error: ValidationError) -> str:
    """The first thing wrong, in one line: its key, what was found and what is allowed."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"] if part != "function-after")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        allowed = _allowed_keys(first["loc"])
        close = difflib.get_close_matches(str(first["loc"][-1]), allowed, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        return f"{key}: unknown key{hint}; allowed here: {', '.join(allowed)}"
    if first["type"] == "missing":
        return f"{key}: missing"
    found = "" if isinstance(first["input"], dict) else f" (found {first['input']!r})"
    return f"{key}: {message}{found}" if key else message


def _allowed_keys(location: tuple[int | str, ...]) -> list[str]:
    """The keys of the table in which an unknown key was found."""
    tables = {name: field.annotation for name, field in CellSettings.model_fields.items()}
    tables |= {"override": Override, "where": Where, "continued": Continued}
    named = [part for part in location[:-1] if part in tables]
    owner: Any = tables[named[-1]] if named else Profile
    names = getattr(owner, "model_fields", None) or owner.__dataclass_fields__
    return [name for name in names if not name.startswith("_")]
