"""How a launcher and its worker processes talk: one line a run, each way."""

import json
import os
import sys
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


def serve(worker: Carrier) -> None:
    """Carry out the runs named on standard input until it ends.

    Answers ``{"ending": …, "reason": …}`` on standard output for each. Anything else printed goes
    to standard error, so that no library's message is taken for an answer.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    runs = worker.plan.by_identity()
    # readline, not iteration: iterating reads ahead and would hold back a name.
    while name := sys.stdin.readline().strip():
        ending, reason = worker.carry_out(runs[name])
        print(json.dumps({"ending": ending, "reason": reason}), file=answers)
        if worker.should_stop():
            return
