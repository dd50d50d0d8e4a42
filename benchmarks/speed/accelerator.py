"""Rows of a GPU at the sizes that it is for: the paper's networks, bfloat16, batches of 256."""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import calibrate
from benchmarks.cost import passes
from benchmarks.speed.conditions import beside_users
from benchmarks.speed.core import Call, ratios
from benchmarks.speed.pipeline import share, torchvision_loader
from benchmarks.speed.row import Bench, Row, Variant
from benchmarks.speed.subjects import SMALL, settings, steps, trainer
from benchmarks.speed.training import EPOCHS, POST, epochs
from pof.ensemble import Ensemble
from pof.settings import OptimizerSettings, SAMSettings
from pof.training import Trainer

_PROTOCOL = {"precision": "bf16", "batch_size": 256}
WIDE = Variant("wrn_28_10-32", "wrn_28_10", "cifar10", _PROTOCOL)
MEDIUM = Variant("wrn_16_4-32", "wrn_16_4", "cifar10", _PROTOCOL)
EAGER = WIDE._replace(name="eager")
COMPILED = WIDE._replace(name="compiled", changes=_PROTOCOL | {"compile": True})

_MOST_WORKERS = 8  # of the plain loop: enough that it waits for the GPU alone


def sam_step_flops(bench: Bench, variant: Variant) -> float:
    """Floating-point operations (2 × multiply-add) of a SAM step on a full batch.

    The convolutions and the classifier of one image's forward are counted on the network itself;
    a backward counts as two forwards, and SAM's step is two of each. What works on single numbers
    (BatchNorm, the perturbation, the optimizer) is not counted: it is what the share pays for.
    """
    chosen = settings(bench, variant, "sam")
    return calibrate.outline(chosen).forward_flops * passes(chosen) * chosen.batch_size


def _matmul_share(bench: Bench, variant: Variant) -> list[float]:
    size = bench.scale.matrix
    generator = torch.Generator(bench.device).manual_seed(0)
    a, b = (
        torch.randn(size, size, generator=generator, device=bench.device).bfloat16()
        for _ in range(2)
    )

    def multiply() -> None:
        for _ in range(bench.steps):
            torch.mm(a, b)

    step = steps(trainer(bench, variant, "sam"), bench.steps)
    timed = bench.alternate({"matmul": multiply, "step": step})
    work = sam_step_flops(bench, variant) / (2.0 * size**3)  # a step's, in such products
    return [work * product for product in ratios(timed["matmul"], timed["step"])]


class PlainSAM:
    """SAM as a plain training loop has it: a Python loop over the parameters, twice.

    Args:
        network: Maps images to logits.
        optimizer: Over its parameters.
        rho: Radius of the perturbation.
    """

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, rho: float) -> None:
        self.network = network
        self.optimizer = optimizer
        self.rho = rho

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Train on one batch."""
        self._gradient(images, labels)
        trained = [p for p in self.network.parameters() if p.grad is not None]
        kept = []
        with torch.no_grad():
            gradients = [p.grad for p in trained if p.grad is not None]
            norm = torch.stack([g.norm() for g in gradients]).norm()
            for p, g in zip(trained, gradients, strict=True):
                kept.append(p.clone())
                p.add_(g * (self.rho / (norm + 1e-12)))
        self._gradient(images, labels)
        with torch.no_grad():
            for p, before in zip(trained, kept, strict=True):
                p.copy_(before)
        self.optimizer.step()

    def _gradient(self, images: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.network(images), labels).backward()


@contextmanager
def _tf32_and_tuned() -> Iterator[None]:
    """What a plain loop is given: TF32 everywhere, cuDNN choosing by trying."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.benchmark = False


def _beside_plain_loop(bench: Bench, variant: Variant) -> list[float]:
    """Our images/s over the plain loop's, an epoch at a time."""
    ours = trainer(bench, variant, "sam", images=bench.scale.loop_images)
    network = trainer(bench, variant, "sgd", channels_last=False, compile=False).network
    base = OptimizerSettings()
    optimizer = torch.optim.SGD(
        network.parameters(), lr=1e-9, momentum=base.momentum, weight_decay=base.weight_decay
    )
    plain = PlainSAM(network, optimizer, SAMSettings().rho)
    workers = min(_MOST_WORKERS, os.cpu_count() or 1)
    with torchvision_loader(ours, variant, workers) as loader:

        def epoch() -> None:
            network.train()
            with _tf32_and_tuned():
                for images, labels in loader:
                    plain.step(
                        images.to(bench.device, non_blocking=True),
                        labels.to(bench.device, non_blocking=True),
                    )

        timed = beside_users(bench, {"ours": ours.train_epoch}, {"theirs": epoch})
    return ratios(timed["theirs"], timed["ours"])


def _pair_minutes(bench: Bench, variant: Variant) -> list[float]:
    """SAM's whole training, and PoF from its checkpoint where the second stage begins."""
    images = bench.scale.epoch_images
    timed = bench.alternate(
        {
            method: trainer(bench, variant, method, images=images).train_epoch
            for method in ("sam", "pof")
        }
    )
    return [
        ((EPOCHS + POST) * sam + POST * pof) / 60.0
        for sam, pof in zip(timed["sam"], timed["pof"], strict=True)
    ]


def train_at_once(trainers: Sequence[Trainer], count: int) -> Call:
    """A call that trains ``count`` steps of each at once, as a worker does with seeds."""
    ensemble = Ensemble(len(trainers))
    for place, member in enumerate(trainers):
        member.gradient.objective = ensemble.member(place, member.gradient.objective)
    alone = [steps(member, count) for member in trainers]

    def call() -> None:
        broken: list[BaseException] = []

        def train(place: int) -> None:
            try:
                alone[place]()
            except BaseException as error:
                broken.append(error)
                ensemble.leave(place)  # or the others would wait for it

        threads = [threading.Thread(target=train, args=(i,)) for i in range(len(alone))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if broken:
            raise broken[0]

    return call


def _seeds_at_once(bench: Bench, variant: Variant) -> list[float]:
    def trainers() -> list[Trainer]:
        return [trainer(bench, variant, "sam", seed=seed) for seed in range(bench.scale.seeds)]

    one_by_one = [steps(member, bench.steps) for member in trainers()]

    def in_turn() -> None:
        for call in one_by_one:
            call()

    at_once = train_at_once(trainers(), bench.steps)
    timed = bench.alternate({"at once": at_once, "in turn": in_turn})
    return ratios(timed["at once"], timed["in turn"])


def _peak_memory(bench: Bench, variant: Variant) -> list[float]:
    """From before the network is built: weights, momentum and SAM's copy count."""

    def work() -> None:
        steps(trainer(bench, variant, "sam"), 2)()

    return [bench.peak_memory(work) / 2**30]


ROWS = (
    Row(
        "matmul-share",
        "WRN-28-10's SAM step in bf16, batch 256, input and optimizer included: rate of its "
        "convolutions / the device's own rate of 8192³ bf16 products; the faster of both counts",
        _matmul_share,
        limit=1.0,
        goal=0.45,
        at_least=True,
        variants=(EAGER, COMPILED),
        device="cuda",
    ),
    Row(
        "plain-loop",
        "our images/s training WRN-28-10 with SAM in bf16 / those of a plain loop: fp32 with TF32, "
        "eager, contiguous, torchvision transforms in a DataLoader, the perturbation in Python",
        _beside_plain_loop,
        goal=5.0,
        at_least=True,
        variants=(EAGER, COMPILED),
        device="cuda",
    ),
    Row(
        "pair-minutes",
        "a seed's pair SAM 250 and SAM 200 + PoF 50 (200 shared), WRN-16-4, 50,000 images, bf16: "
        "measured epochs × their number, without tests and starts",
        _pair_minutes,
        goal=8.0,
        unit="min",
        variants=(MEDIUM,),
        device="cuda",
    ),
    Row(
        "seeds-at-once",
        "SAM steps of 4 seeds of WRN-16-4, in bf16 and batches of 256, trained at once side by "
        "side in one network / one after the other",
        _seeds_at_once,
        goal=1 / 1.5,
        variants=(MEDIUM,),
        device="cuda",
    ),
    Row(
        "seeds-at-once",
        "SAM steps of 4 seeds of a small network at once / one after the other",
        _seeds_at_once,
        variants=(SMALL,),
    ),
    Row(
        "input-share",
        "order, gather, augmentation and normalisation of a batch / an SGD step, bf16, batch 256",
        share,
        limit=0.0,
        goal=0.02,
        variants=(MEDIUM, WIDE),
        device="cuda",
    ),
    Row(
        "pof-epoch",
        "PoF epoch / SAM epoch, bf16, batch 256",
        epochs,
        limit=2 / 3,
        goal=0.70,
        variants=(MEDIUM, WIDE),
        device="cuda",
    ),
    Row(
        "peak-memory",
        "most memory in use during WRN-28-10's SAM step in bf16, batch 256",
        _peak_memory,
        unit="GiB",
        variants=(WIDE,),
        device="cuda",
    ),
)
