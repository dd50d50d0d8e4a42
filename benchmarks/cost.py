"""What runs cost: time from the time of one step, disk from the number of parameters.

Free of PyTorch. The times of one step are measured (``benchmarks.calibrate``) and kept here as
``Calibration``, or estimated from counted floating-point operations (``Estimate``).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field, ValidationError

from benchmarks.environment import packages, slug
from benchmarks.errors import UserError
from benchmarks.files import read_json, write_json
from benchmarks.plan import Plan
from benchmarks.run import Run, RunSettings
from benchmarks.settings import DataSettings, NetworkSettings, OffUnlessSaid, Strict
from pof.settings import AugmentationSettings

SCHEMA = 1
FOLDER = "calibration"  # in RUNS_DIR
CHECKPOINT_SECONDS = 60.0  # a run saves its state about this often
_BYTES = 4  # of a float32: weights and momentum, whatever the precision of the passes

Basis = Literal["measured", "estimate"]


class Images(NamedTuple):
    """How many images are trained and evaluated on."""

    train: int
    test: int


def catalogued(dataset: str) -> Images:
    """All images of a data set."""
    from pof.data.catalogue import DATASETS  # loads PyTorch: only where it is needed

    return Images(DATASETS[dataset].train_count, DATASETS[dataset].test_count)


def images_of(choice: DataSettings, whole: Images) -> Images:
    """The images of a run, of those that its data set has."""
    train = choice.train_size or max(1, whole.train - choice.holdout)
    return Images(train, choice.holdout or whole.test)


def passes(settings: RunSettings) -> float:
    """Forward passes that an image of an epoch costs; a backward pass counts as two."""
    if settings.pof is not None:
        share = (settings.pof.range_batch_size or settings.batch_size) / settings.batch_size
        return 3.0 + share
    return 6.0 if settings.algorithm == "sam" else 3.0


def work(run: Run, whole: Images | None = None) -> float:
    """Work of a run in forward passes of single images.

    Args:
        run: The run.
        whole: How many images its data set has; ``None``: looked up.
    """
    settings = run.settings
    train = settings.data.train_size
    if train is None:
        train = images_of(settings.data, whole or catalogued(settings.dataset)).train
    return (settings.last_epoch - settings.first_epoch) * train * passes(settings)


def priorities(plan: Plan, work_of: Callable[[Run], float] = work) -> dict[str, float]:
    """Work from the start of each run to the end of the longest chain through it, by identity.

    This is the order in which an executor starts runs: the longest way to the end first.
    """
    longest: dict[str, float] = {}
    below: dict[str, float] = {}
    for run in reversed(plan.runs):
        longest[run.identity] = work_of(run) + below.get(run.identity, 0.0)
        if run.parent is not None:
            below[run.parent] = max(below.get(run.parent, 0.0), longest[run.identity])
    return longest


class WorkerKind(NamedTuple):
    """What a worker process has of its machine.

    Attributes:
        threads: Its threads.
        jobs: Workers on the machine at once, which share its caches and memory.
    """

    threads: int
    jobs: int


class Key(Strict):
    """Everything that moves the time of a step on a given device.

    Attributes:
        dataset: Sets the size of an image and the number of classes.
        backbone: Name.
        network: How it is built.
        augmentation: What is done to training images.
        batch_size: Images a batch.
        precision: Of forward and backward.
        channels_last: Memory format.
        compile: Whether the feature extractor is compiled.
        algorithm: ``sgd``, ``sam`` or ``pof``.
        detail: Those settings of the algorithm that change its arithmetic.
        threads: Of the worker.
        jobs: Workers at once on the machine.
        torch: Version of PyTorch.
    """

    dataset: str
    backbone: str
    network: NetworkSettings
    augmentation: AugmentationSettings
    batch_size: int
    precision: str
    channels_last: bool
    compile: OffUnlessSaid = False
    algorithm: str
    detail: str
    threads: int
    jobs: int
    torch: str


def key_of(settings: RunSettings, worker: WorkerKind, torch: str | None = None) -> Key:
    """The key under which the times of a run's steps are kept.

    Args:
        settings: Of the run.
        worker: What trains it.
        torch: Version of PyTorch; ``None``: the one installed.
    """
    detail = ""
    if settings.sam is not None:
        parts = settings.sam.m_sharpness or settings.batch_size
        detail = f"{'asam' if settings.sam.adaptive else 'sam'} m={parts}"
    if settings.pof is not None:
        ranged = settings.pof.range_batch_size or settings.batch_size
        detail = f"{settings.pof.search} B={ranged}"
    return Key(
        dataset=settings.dataset,
        backbone=settings.backbone,
        network=settings.network,
        augmentation=settings.augmentation,
        batch_size=settings.batch_size,
        precision=settings.precision,
        channels_last=settings.channels_last,
        compile=settings.compile,
        algorithm=settings.algorithm,
        detail=detail,
        threads=worker.threads,
        jobs=worker.jobs,
        torch=torch or packages()["torch"],
    )


class Outline(Strict):
    """What a network and its data amount to, counted without training anything.

    Attributes:
        train_images: Of the whole data set.
        test_images: Likewise.
        parameters: Of the network.
        buffers: Numbers beside the parameters: BatchNorm's running statistics.
        forward_flops: Floating-point operations of one image's forward pass (2 × MAC).
    """

    train_images: int
    test_images: int
    parameters: int
    buffers: int
    forward_flops: float

    @property
    def images(self) -> Images:
        """All images of the data set."""
        return Images(self.train_images, self.test_images)

    @property
    def checkpoint_bytes(self) -> int:
        """Size of a checkpoint: weights and momentum."""
        return _BYTES * (2 * self.parameters + self.buffers)


class Rates(Strict):
    """How fast a worker is, in seconds.

    Attributes:
        step: One training step on a full batch.
        evaluation: Testing one image.
        setup: Beginning a run: its network, its data on the device, its record.
        save: Writing one checkpoint.
    """

    step: float
    evaluation: float
    setup: float = 0.0
    save: float = 0.0


class Measurement(Strict):
    """The measured times of one kind of step."""

    key: Key
    outline: Outline
    rates: Rates


class Start(Strict):
    """What a worker process costs beside its runs, in seconds.

    Attributes:
        process: To start and to end.
        loading: To read a data set, by name; those that were not there are missing.
    """

    process: float = 0.0
    loading: dict[str, float] = Field(default_factory=dict)


class Calibration(Strict):
    """What was measured on one device.

    Attributes:
        schema_version: Of this file.
        device: Its name.
        kind: ``cpu`` or ``cuda``.
        starts: By kind of worker, as ``start_key`` writes it.
        measurements: One a key.
    """

    schema_version: int = SCHEMA
    device: str
    kind: str
    starts: dict[str, Start]
    measurements: list[Measurement]

    def find(self, settings: RunSettings, worker: WorkerKind) -> Measurement | None:
        """What was measured for a run, if anything was."""
        key = key_of(settings, worker)
        return next((m for m in self.measurements if m.key == key), None)

    def start_of(self, worker: WorkerKind) -> Start:
        """What a worker process costs beside its runs; nothing if unknown."""
        return self.starts.get(start_key(worker), Start())

    def workers(self) -> list[WorkerKind]:
        """Kinds of workers that were measured, the latest first."""
        kinds = [WorkerKind(m.key.threads, m.key.jobs) for m in reversed(self.measurements)]
        return list(dict.fromkeys(kinds))

    def with_newer(self, newer: "Calibration") -> "Calibration":
        """Both, the newer measurement of a key in place of the older."""
        keys = [m.key for m in newer.measurements]
        older = [m for m in self.measurements if m.key not in keys]
        starts = dict(self.starts)
        for kind, start in newer.starts.items():
            loading = starts.get(kind, Start()).loading | start.loading
            starts[kind] = Start(process=start.process, loading=loading)
        return newer.model_copy(
            update={"starts": starts, "measurements": [*older, *newer.measurements]}
        )


def start_key(worker: WorkerKind) -> str:
    """Under what the start of a kind of worker is kept."""
    return f"{worker.threads}x{worker.jobs}"


def calibration_file(runs_dir: Path, device: str) -> Path:
    """Where the measurements of a device are kept."""
    return runs_dir / FOLDER / f"{slug(device)}.json"


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write a calibration, whole or not at all."""
    write_json(path, calibration.model_dump(mode="json"))


def read_calibration(path: Path) -> Calibration:
    """Read a calibration.

    Raises:
        UserError: It is of another version or broken.
    """
    again = "remove it and calibrate again"
    content = read_json(path)
    if content.get("schema_version") != SCHEMA:
        raise UserError(f"{path}: not a calibration of this version; {again}")
    try:
        return Calibration.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {where}: {first['msg']}; {again}") from error


def read_calibrations(runs_dir: Path) -> list[Calibration]:
    """All calibrations, the latest written first."""
    files = sorted((runs_dir / FOLDER).glob("*.json"), key=lambda p: -p.stat().st_mtime)
    return [read_calibration(path) for path in files]


# Dense peaks of an NVIDIA A100, the hardware of the paper, in TFLOP/s.
PEAKS = {"bf16": 312.0, "fp32": 19.5}


class Estimate(NamedTuple):
    """From counted operations to seconds, where nothing was measured.

    Attributes:
        peak_tflops: Peak of the device in TFLOP/s; ``None``: an NVIDIA A100's.
        utilisation: The share of the peak that training reaches.
    """

    peak_tflops: float | None = None
    utilisation: float = 0.35

    def rates(self, settings: RunSettings, outline: Outline) -> Rates:
        """The rates of a run.

        What does not grow with the network (start-up, kernel launches, augmentation) is left
        out: small networks take longer.
        """
        peak = self.peak_tflops or PEAKS[settings.precision]
        forward = outline.forward_flops / (peak * 1e12 * self.utilisation)
        return Rates(
            step=passes(settings) * settings.batch_size * forward,
            evaluation=forward,
        )

    def describe(self) -> str:
        """What the estimate rests on."""
        peak = (
            f"{self.peak_tflops:g} TFLOP/s"
            if self.peak_tflops
            else f"an A100's {PEAKS['bf16']:g} (bf16) or {PEAKS['fp32']:g} (fp32) TFLOP/s"
        )
        return f"counted FLOPs at {100 * self.utilisation:g}% of {peak}"


class RunCost(NamedTuple):
    """What one run costs.

    Attributes:
        seconds: Training, tests and checkpoints: what the run's result records as its time.
        setup: Seconds before that.
        checkpoint_bytes: One checkpoint of it.
        basis: Where the times come from.
    """

    seconds: float
    setup: float
    checkpoint_bytes: int
    basis: Basis

    @property
    def occupied(self) -> float:
        """Seconds for which the run occupies a worker."""
        return self.seconds + self.setup


def evaluations(run: Run) -> int:
    """How often a run is tested: every so many epochs, and after the last."""
    first, last, every = run.settings.first_epoch, run.settings.last_epoch, run.evaluate_every
    regular = last // every - first // every
    return regular + (last % every != 0)


def run_cost(run: Run, rates: Rates, outline: Outline, basis: Basis) -> RunCost:
    """The cost of a run at given rates."""
    settings = run.settings
    images = images_of(settings.data, outline.images)
    epochs = settings.last_epoch - settings.first_epoch
    seconds = epochs * images.train / settings.batch_size * rates.step
    seconds += evaluations(run) * images.test * rates.evaluation
    seconds += (1 + seconds // CHECKPOINT_SECONDS) * rates.save
    return RunCost(seconds, rates.setup, outline.checkpoint_bytes, basis)
