"""How a launcher and its worker processes talk: one line a run, each way."""

import json
import os
import sys

from benchmarks.worker import Worker


def serve(worker: Worker) -> None:
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
