"""Stands in for ``python -m benchmarks work``: does to each run what it is told, without PyTorch.

The file that ``FAKE_ORDERS`` names maps labels of runs to what happens at each try, in turn;
what is not named is done.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from benchmarks import plan as planning
from benchmarks.store import Busy, State, Store
from tests.harness import finish, wait_until


def main(arguments: list[str]) -> None:
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    store = Store(Path(options["--runs-dir"]))
    runs = planning.read(Path(options["--plan-file"])).by_identity()
    orders = json.loads(Path(os.environ["FAKE_ORDERS"]).read_text())
    workers = store.root / "workers"
    workers.mkdir(exist_ok=True)
    (workers / str(os.getpid())).touch()

    def answer(run, ending, reason=""):
        said = {"run": run.identity, "ending": ending, "reason": reason}
        print(json.dumps(said), flush=True)

    queue = []
    while queue or (queue := sys.stdin.readline().split()):
        run = runs[queue.pop(0)]
        folder = store.folder(run)
        tries = store.root / "tries"
        ending, reason = "DONE", ""
        try:
            with folder.lock():
                if folder.state_of_files() is State.DONE:
                    answer(run, ending)
                    continue
                with tries.open("a") as file:
                    file.write(run.label + "\n")
                count = tries.read_text().splitlines().count(run.label)
                order = (orders.get(run.label, []) + count * ["done"])[count - 1]
                folder.write_progress({})
                if order == "crash":
                    os.kill(os.getpid(), signal.SIGKILL)
                elif order == "exit":
                    sys.exit(3)
                elif order == "stopped":
                    answer(run, "INTERRUPTED")
                    return
                elif order == "fail":
                    folder.create(run)
                    folder.write_failure("a reason", "trace")
                    ending, reason = "FAILED", "a reason"
                elif order == "wait":
                    signal.pause()
                elif order.startswith("last "):  # so many seconds
                    time.sleep(float(order.split()[1]))
                    finish(store, run, 5.0)
                elif order == "hold":  # until a second worker is there
                    wait_until(lambda: len(list(workers.iterdir())) > 1)
                    finish(store, run, 5.0)
                else:
                    finish(store, run, 5.0)
        except Busy:
            ending = "BUSY"
        answer(run, ending, reason)


if __name__ == "__main__":
    main(sys.argv[sys.argv.index("work") + 1 :])
