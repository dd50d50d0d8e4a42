"""How a launcher and its worker processes talk: one line an order, one line a run that ended."""

import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from benchmarks.plan import Plan
from benchmarks.run import Run
from benchmarks.worker import Ending


class Carrier(Protocol):
    """Carries out runs of a plan."""

    @property
    def plan(self) -> Plan:
        """The runs."""

    def carry_out(self, run: Run) -> tuple[Ending, str]:
        """Carry one out; how it ended, and in one line why if it did not end well."""

    def should_stop(self) -> bool:
        """Whether to stop between two runs."""


Ended = Callable[[Run, Ending, str], None]


def serve(worker: Carrier, at_once: Callable[[Sequence[Run], Ended], None] | None = None) -> None:
    """Carry out the runs named on standard input, until it ends.

    A line names one run, or several to be carried out at once. For each that has ended, a line
    ``{"run": …, "ending": …, "reason": …}`` is answered on standard output. Anything else printed
    goes to standard error, so that no library's message is taken for an answer.

    Args:
        worker: Carries out one run.
        at_once: Carries out several.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    runs = worker.plan.by_identity()
    answering = threading.Lock()

    def ended(run: Run, ending: Ending, reason: str) -> None:
        answer = json.dumps({"run": run.identity, "ending": ending, "reason": reason})
        with answering:
            print(answer, file=answers)

    # readline, not iteration: iterating reads ahead and would hold back a name.
    while names := sys.stdin.readline().split():
        ordered = [runs[name] for name in names]
        if len(ordered) > 1 and at_once is not None:
            at_once(ordered, ended)
        else:
            for run in ordered:
                ended(run, *worker.carry_out(run))
        if worker.should_stop():
            return
