"""The state of the process that each side is timed in: as our workers set it, or as it comes.

Our workers ask for deterministic algorithms and keep freed memory; a user of a peer does neither.
Where a row compares with a peer as its users run it, each side has its own state, and one untimed
call in it before each repetition, so that neither pays for what the other left behind.
"""

from collections.abc import Callable, Mapping

import torch

from benchmarks.memory import give_back_freed_memory
from benchmarks.speed.core import Call
from benchmarks.speed.row import Bench
from benchmarks.worker import prepare_process


def as_it_comes() -> None:
    """The process as PyTorch and the C library leave it."""
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.allow_tf32 = True
    give_back_freed_memory()


def beside_users(
    bench: Bench, ours: Mapping[str, Call], theirs: Mapping[str, Call]
) -> dict[str, list[float]]:
    """Time our sides as our workers run them and theirs as their users do, in turn."""

    def first(prepare: Callable[[], None], call: Call) -> Call:
        def do() -> None:
            prepare()
            call()

        return do

    before = {name: first(prepare_process, call) for name, call in ours.items()}
    before |= {name: first(as_it_comes, call) for name, call in theirs.items()}
    try:
        return bench.alternate({**ours, **theirs}, before=before)
    finally:
        prepare_process()
