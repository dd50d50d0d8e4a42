"""Measures what the steps of a plan cost on the device at hand, with random images.

No data set is needed: a step's time does not depend on what the images show. (Of those that are
there, the time to load them is measured too.) Measured is the code
that trains (``assembly``, ``pof.training``), under the load that a sweep puts on the machine:
as many workers at once, each with its share of the cores.
"""

import dataclasses
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import assembly, checkpoint, environment
from benchmarks.cost import (
    Calibration,
    Images,
    Key,
    Measurement,
    Outline,
    Rates,
    Start,
    WorkerKind,
    images_of,
    key_of,
    passes,
    start_key,
)
from benchmarks.errors import UserError
from benchmarks.plan import Plan
from benchmarks.run import RunSettings
from benchmarks.worker import choose_device, device_name, prepare_process
from pof.data import DATASETS, load
from pof.data.augmentation import Normalise
from pof.errors import PofError
from pof.training import EVALUATION_BATCH, Trainer, evaluate

_BLOCKS = 5  # of steps; the median counts
_BLOCK_SECONDS = 0.2
_WARM_STEPS = 2
_END_SECONDS = 60.0  # a companion ends after its step
_IMAGES_HELD = 2_000  # random images that batches are drawn from, where a batch is no larger


def outline(settings: RunSettings) -> Outline:
    """Count a run's parameters and floating-point operations; nothing is computed or drawn.

    Raises:
        UserError: There is no such backbone, or it does not fit the images.
    """
    info = DATASETS[settings.dataset]
    state = torch.get_rng_state()
    with torch.device("meta"):
        network = assembly.build_network(settings, info, torch.device("meta")).eval()
        images = torch.empty(1, info.channels, info.image_size, info.image_size)
    torch.set_rng_state(state)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(images)
    return Outline(
        train_images=info.train_count,
        test_images=info.test_count,
        parameters=sum(p.numel() for p in network.parameters()),
        buffers=sum(b.numel() for b in network.buffers()),
        forward_flops=float(counter.get_total_flops()),
    )


def calibrate(
    plan: Plan,
    device: torch.device,
    worker: WorkerKind,
    tell: Callable[[str], None],
    *,
    data_dir: Path,
    scratch: Path,
    seconds: float = 3.0,
) -> Calibration:
    """Measure every kind of step in a plan.

    Args:
        plan: What is to be run.
        device: What computes.
        worker: Threads of a worker, and workers at once on this machine. Sets the threads of
            this process.
        tell: Takes a line for the user.
        data_dir: Where data sets may be: the time to load those that are there is measured.
        scratch: A folder on the disk that checkpoints go to.
        seconds: About how long to measure one kind of step.

    Raises:
        UserError: A network does not exist, or the load could not be started.
    """
    prepare_process()
    torch.set_num_threads(worker.threads)
    cases: dict[str, tuple[Key, RunSettings]] = {}
    for run in plan.runs:
        key = key_of(run.settings, worker)
        cases.setdefault(key.model_dump_json(), (key, run.settings))
    measurements = []
    with _company(plan, device, worker, data_dir) as start:
        for key, settings in cases.values():
            rates = measure(settings, device, scratch, seconds=seconds)
            measurements.append(Measurement(key=key, outline=outline(settings), rates=rates))
            speed = settings.batch_size / rates.step
            tell(
                f"{key.dataset} {key.backbone} {key.augmentation.kind} {key.algorithm}, "
                f"batch {key.batch_size}, {key.precision}: {1e3 * rates.step:.4g} ms a step "
                f"({speed:,.0f} images/s)"
            )
    return Calibration(
        device=device_name(device),
        kind=device.type,
        starts={start_key(worker): start},
        measurements=measurements,
    )


def measure(
    settings: RunSettings, device: torch.device, scratch: Path, *, seconds: float = 3.0
) -> Rates:
    """Time a few steps, a test, a checkpoint and the beginning of a run.

    Args:
        settings: Of the run.
        device: What computes.
        scratch: A folder on the disk that checkpoints go to.
        seconds: About how long to measure steps; at least one step is.
    """
    with _without_randomness():
        began = time.perf_counter()
        subject = random_subject(settings, device, _images(settings))
        trainer = assembly.build_trainer(gently(settings), subject, device)
        environment.describe(device=device_name(device), threads=1, precision=settings.precision)
        _synchronise(device)
        setup = time.perf_counter() - began

        warm = _time_steps(trainer, _WARM_STEPS, device)
        blocks = [warm / _WARM_STEPS] if warm > seconds else []
        if not blocks:
            probe = _time_steps(trainer, 1, device)
            count = max(1, min(50, int(_BLOCK_SECONDS / probe)))
            deadline = time.perf_counter() + seconds
            while not blocks or (len(blocks) < _BLOCKS and time.perf_counter() < deadline):
                blocks.append(_time_steps(trainer, count, device) / count)
        step = statistics.median(blocks)

        forward = step / passes(settings) / settings.batch_size
        count = max(1, min(len(subject.test_labels), int(seconds / 3 / forward)))
        evaluation = _median(lambda: _time_evaluation(trainer, subject, count, settings, device))
        save = _median(lambda: _time_save(trainer, scratch))
    return Rates(step=step, evaluation=evaluation / count, setup=setup, save=save)


def keep_busy() -> None:
    """Train random images until standard input ends: the load of one more worker.

    The first line of standard input says what to do, in JSON. The first line of standard output
    gives, after the first step, the seconds that loading each data set took.
    """
    task = json.loads(sys.stdin.readline())
    settings = RunSettings.model_validate_json(task["settings"])
    device = choose_device(task["device"])
    torch.set_num_threads(task["threads"])
    prepare_process()
    loading = {}
    for name in task["datasets"]:
        began = time.perf_counter()
        try:
            load(name, Path(task["data_dir"]), download=False)
        except PofError:
            continue  # not there: its time stays unknown
        loading[name] = time.perf_counter() - began
    subject = random_subject(settings, device, _images(settings))
    trainer = assembly.build_trainer(gently(settings), subject, device)
    _time_steps(trainer, 1, device)
    print(json.dumps(loading), flush=True)
    while not select.select([sys.stdin], [], [], 0.0)[0]:
        _time_steps(trainer, 1, device)


@contextmanager
def _company(
    plan: Plan, device: torch.device, worker: WorkerKind, data_dir: Path
) -> Iterator[Start]:
    """The load of the other workers; gives what starting them took.

    As many workers are started as there will be, all at once as in a sweep, and one of them is
    ended again: this process takes its place.
    """
    task = {
        "settings": plan.runs[0].settings.model_dump_json(),
        "device": str(device),
        "threads": worker.threads,
        "datasets": list(dict.fromkeys(run.settings.dataset for run in plan.runs)),
        "data_dir": str(data_dir),
    }
    began = time.perf_counter()
    others = [_start_companion(task, worker) for _ in range(worker.jobs)]
    try:
        loading: dict[str, float] = {}
        for other in others:
            answer = _output(other).readline()
            if not answer:
                raise UserError("a worker that was started to load the machine ended; see above")
            loading |= json.loads(answer)
        process = time.perf_counter() - began - sum(loading.values())
        began = time.perf_counter()
        _end(others.pop())
        process += time.perf_counter() - began
        yield Start(process=process, loading=loading)
    finally:
        for other in others:
            _end(other)


def _start_companion(task: dict[str, Any], worker: WorkerKind) -> subprocess.Popen[str]:
    limits = {name: str(worker.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    process = subprocess.Popen(
        [sys.executable, "-c", "from benchmarks.calibrate import keep_busy; keep_busy()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | limits,
        cwd=Path(__file__).parent.parent,
        start_new_session=True,
    )
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.write(json.dumps(task) + "\n")
        process.stdin.flush()
    return process


def _end(process: subprocess.Popen[str]) -> None:
    """End a companion: it leaves when its standard input ends."""
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _output(process).close()


def _images(settings: RunSettings) -> Images:
    """The images of a run."""
    info = DATASETS[settings.dataset]
    return images_of(settings.data, Images(info.train_count, info.test_count))


def _output(process: subprocess.Popen[str]) -> IO[str]:
    assert process.stdout is not None
    return process.stdout


def gently(settings: RunSettings) -> RunSettings:
    """The same arithmetic at a learning rate at which noise cannot make the loss diverge."""
    optimizer = dataclasses.replace(settings.optimizer, learning_rate=1e-9)
    pof = settings.pof and dataclasses.replace(settings.pof, learning_rate=None)
    return settings.model_copy(update={"optimizer": optimizer, "pof": pof})


def random_subject(
    settings: RunSettings, device: torch.device, images: Images, *, held: int = _IMAGES_HELD
) -> assembly.Subject:
    """Images and labels of the data set's shape that show nothing.

    Args:
        settings: Of the run.
        device: What computes.
        images: Most of them.
        held: Most training images, but for a batch that is larger.
    """
    info = DATASETS[settings.dataset]
    generator = torch.Generator().manual_seed(0)
    size = (info.image_size, info.image_size, info.channels)

    def draw(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = torch.randint(256, (count, *size), generator=generator, dtype=torch.uint8)
        labels = torch.randint(info.num_classes, (count,), generator=generator)
        return pixels.to(device), labels.to(device)

    held = min(images.train, max(held, settings.batch_size))
    whole_batches = max(1, held // settings.batch_size) * settings.batch_size
    train_images, train_labels = draw(whole_batches)
    test_images, test_labels = draw(min(images.test, EVALUATION_BATCH))
    return assembly.Subject(
        info=info,
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        normalise=Normalise(info.mean, info.std, device=device),
    )


def _time_steps(trainer: Trainer, count: int, device: torch.device) -> float:
    """Seconds of ``count`` training steps, the ends of epochs among them."""
    left = count

    def after_step() -> bool:
        nonlocal left
        left -= 1
        return left > 0

    _synchronise(device)
    began = time.perf_counter()
    while left > 0:
        if trainer.train_epoch(after_step) is not None:
            left -= 1  # the last step of an epoch has no callback
    _synchronise(device)
    return time.perf_counter() - began


def _time_evaluation(
    trainer: Trainer,
    subject: assembly.Subject,
    count: int,
    settings: RunSettings,
    device: torch.device,
) -> float:
    """Seconds of testing the network on ``count`` images."""
    _synchronise(device)
    began = time.perf_counter()
    evaluate(
        trainer.network,
        subject.test_images[:count],
        subject.test_labels[:count],
        subject.normalise,
        settings.precision,
    )
    _synchronise(device)
    return time.perf_counter() - began


def _time_save(trainer: Trainer, scratch: Path) -> float:
    """Seconds of writing a checkpoint."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        began = time.perf_counter()
        checkpoint.save(Path(folder), {"trainer": trainer.state_dict()}, epoch=0, step=0)
        return time.perf_counter() - began


def _median(timed: Callable[[], float]) -> float:
    """Median of three after one to warm up."""
    timed()
    return statistics.median(timed() for _ in range(3))


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _without_randomness() -> Iterator[None]:
    """Leave the global generator as it was."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
