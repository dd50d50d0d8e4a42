"""How long compiling took: apart from training, since it is paid at every start of a run."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any


@dataclass
class Compiling:
    """Time spent compiling.

    Attributes:
        seconds: So far; they pass within the step that needed the code.
    """

    seconds: float = 0.0


@contextmanager
def measured() -> Iterator[Compiling]:
    """Within the context, count the seconds in which ``torch.compile`` compiles."""
    import torch._dynamo.callback as callbacks  # takes a second, which others need not wait

    compiling = Compiling()
    began = 0.0

    def start(_: Any) -> None:
        nonlocal began
        began = time.perf_counter()

    def end(_: Any) -> None:
        compiling.seconds += time.perf_counter() - began

    callbacks.on_compile_start(start)
    callbacks.on_compile_end(end)
    try:
        yield compiling
    finally:
        callbacks.callback_handler.remove_start_callback(start)
        callbacks.callback_handler.remove_end_callback(end)


def unmeasured() -> AbstractContextManager[Compiling]:
    """Where nothing is compiled."""
    return nullcontext(Compiling())
