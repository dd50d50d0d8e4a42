"""Rows of the training steps: what SAM and PoF cost, beside their arithmetic and a peer."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import compilation
from benchmarks.speed.conditions import beside_users
from benchmarks.speed.core import ratios
from benchmarks.speed.row import Bench, Row, Variant, peer
from benchmarks.speed.subjects import SMALL, VARIANTS, steps, trainer
from pof.data.batches import laid_out
from pof.settings import OptimizerSettings, SAMSettings
from pof.training import Trainer

EPOCHS, POST = 200, 50  # of the paper
_WATCHED = 4  # steps


def _methods(bench: Bench, variant: Variant, over: str, under: str) -> list[float]:
    """Ratio of the training steps of two methods, everything of a step included."""
    timed = bench.alternate(
        {name: steps(trainer(bench, variant, name), bench.steps) for name in (over, under)}
    )
    return ratios(timed[over], timed[under])


def _sam_over_sgd(bench: Bench, variant: Variant) -> Sequence[float]:
    return _methods(bench, variant, "sam", "sgd")


def _pof_over_sgd(bench: Bench, variant: Variant) -> Sequence[float]:
    return _methods(bench, variant, "pof", "sgd")


def epochs(bench: Bench, variant: Variant) -> list[float]:
    """Ratio of whole epochs of PoF and of SAM: their records at the end included."""
    timed = bench.alternate(
        {name: trainer(bench, variant, name).train_epoch for name in ("pof", "sam")}
    )
    return ratios(timed["pof"], timed["sam"])


def _pair(bench: Bench, variant: Variant) -> Sequence[float]:
    """Cost of (SAM, SAM+PoF) with the first stage trained once over that of two full runs."""
    cost = _methods(bench, variant, "pof", "sam")  # of an epoch, in SAM epochs
    return [(EPOCHS + POST + POST * pof) / (EPOCHS + POST + EPOCHS + POST * pof) for pof in cost]


def _setting(**changes: Any) -> Callable[[Bench, Variant], list[float]]:
    """SGD step with a setting changed over that without."""

    def measure(bench: Bench, variant: Variant) -> list[float]:
        changed = trainer(bench, variant, "sgd", **changes)
        timed = bench.alternate(
            {
                "changed": steps(changed, bench.steps),
                "plain": steps(trainer(bench, variant, "sgd"), bench.steps),
            }
        )
        return ratios(timed["changed"], timed["plain"])

    return measure


def _compile_seconds(bench: Bench, variant: Variant) -> list[float]:
    import torch._inductor.config as inductor  # takes a second, which other rows need not wait

    torch.compiler.reset()
    with inductor.patch(force_disable_caches=True), compilation.measured() as compiling:
        steps(trainer(bench, variant, "sgd", compile=True))()
    return [compiling.seconds]


def _host_waits(bench: Bench, variant: Variant) -> list[float]:
    """For each method, 1 if a step between two others made the host wait for the device."""
    return [float(_waits(trainer(bench, variant, method))) for method in ("sgd", "sam", "pof")]


def _waits(trainer: Trainer) -> bool:
    done = 0

    def after_step() -> bool:
        nonlocal done
        done += 1
        torch.cuda.set_sync_debug_mode("error" if done < _WATCHED else "default")
        return done < _WATCHED

    try:
        trainer.train_epoch(after_step)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def _our_sam_step(bench: Bench, variant: Variant) -> tuple[Callable[[], None], Tensor, Tensor]:
    """Our SAM step on one batch, and that batch."""
    ours = trainer(bench, variant, "sam")
    ours.network.train()
    images, labels = ours.batches.draw()

    def step() -> None:
        ours.gradient(images, labels)
        ours.optimizer.step()

    return step, images, labels


def _peer_sam_step(
    bench: Bench,
    variant: Variant,
    images: Tensor,
    labels: Tensor,
    memory_format: torch.memory_format,
) -> Callable[[], None]:
    """The step of pytorch_optimizer's SAM, as its documentation writes it, on SGD."""
    SAM = peer("pytorch_optimizer", "pytorch_optimizer").SAM
    network: nn.Module = trainer(bench, variant, "sam").network
    network = network.to(memory_format=memory_format).train()  # type: ignore[call-overload]
    images = laid_out(images, memory_format)
    base = OptimizerSettings()
    optimizer = SAM(
        network.parameters(),
        torch.optim.SGD,
        rho=SAMSettings().rho,
        lr=1e-9,
        momentum=base.momentum,
        nesterov=base.nesterov,
        weight_decay=base.weight_decay,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(network(images), labels)
        loss.backward()
        return loss

    def step() -> None:
        closure()
        optimizer.step(closure)

    return step


def _beside_peer(bench: Bench, variant: Variant) -> list[float]:
    """Everything the same: memory format, allocator, deterministic algorithms."""
    ours, images, labels = _our_sam_step(bench, variant)
    theirs = _peer_sam_step(bench, variant, images, labels, torch.channels_last)
    timed = bench.alternate({"ours": ours, "theirs": theirs})
    return ratios(timed["ours"], timed["theirs"])


def _beside_peers_users(bench: Bench, variant: Variant) -> list[float]:
    """Each as it is run."""
    ours, images, labels = _our_sam_step(bench, variant)
    theirs = _peer_sam_step(bench, variant, images, labels, torch.contiguous_format)
    timed = beside_users(bench, {"ours": ours}, {"theirs": theirs})
    return ratios(timed["ours"], timed["theirs"])


ROWS = (
    Row(
        "sam-step",
        "SAM step / SGD step, each with its input and its optimizer",
        _sam_over_sgd,
        limit=2.0,
        goal=2.08,
        variants=VARIANTS,
    ),
    Row(
        "pof-step",
        "PoF step / SGD step, equal batches, range search included",
        _pof_over_sgd,
        limit=4 / 3,
        goal=1.42,
        variants=VARIANTS,
    ),
    Row(
        "pof-epoch",
        "PoF epoch / SAM epoch",
        epochs,
        limit=2 / 3,
        goal=0.71,
        cuda_goal=0.70,
        variants=VARIANTS,
    ),
    Row(
        "sam-peer",
        "our SAM step / pytorch_optimizer's, same network, batch and memory format",
        _beside_peer,
        limit=1.0,
        goal=1.0,
        variants=VARIANTS,
    ),
    Row(
        "sam-peer-contiguous",
        "our SAM step with our defaults / pytorch_optimizer's as its users run it (contiguous)",
        _beside_peers_users,
        goal=0.85,
        variants=VARIANTS,
    ),
    Row(
        "pair",
        "SAM 250 and SAM 200 + PoF 50 with 200 epochs shared / two separate runs of 250, "
        "by the measured cost of an epoch",
        _pair,
        limit=17 / 29,
        goal=0.61,
        variants=VARIANTS,
    ),
    Row(
        "compile-step",
        "SGD step compiled / as it is",
        _setting(compile=True),
        variants=(SMALL,),
    ),
    Row(
        "compile-seconds",
        "what compiling an SGD step takes, once a start",
        _compile_seconds,
        unit="s",
        variants=(SMALL,),
    ),
    Row(
        "bf16-step",
        "SGD step in bf16 autocast / in fp32",
        _setting(precision="bf16"),
        variants=VARIANTS,
        device="cuda",
    ),
    Row(
        "host-waits",
        "whether a step of SGD, SAM or PoF makes the host wait (sync debug mode)",
        _host_waits,
        limit=0.0,
        goal=0.0,
        unit="",
        variants=VARIANTS,
        device="cuda",
    ),
)
