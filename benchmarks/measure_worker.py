"""Carries out measurements that are runs of a store of their own; see ``benchmarks.measuring``."""

import time

from benchmarks.measure import Measurer
from benchmarks.measuring import measurement_of
from benchmarks.plan import Plan
from benchmarks.run import Run
from benchmarks.store import RunFolder, State, Store
from benchmarks.worker import Ending, carry_out


class MeasuringWorker:
    """Measures, where a worker would train.

    Args:
        store: Of the measurements.
        plan: The measurements.
        measurer: Measures the runs that were trained.
    """

    def __init__(self, store: Store, plan: Plan, measurer: Measurer) -> None:
        self.store = store
        self.plan = plan
        self.measurer = measurer
        trained = measurer.store
        done = [r for r in measurer.plan.runs if trained.folder(r).state_of_files() is State.DONE]
        self._subjects = {measurement_of(run, trained).identity: run for run in done}

    def carry_out(self, run: Run) -> tuple[Ending, str]:
        """Make one measurement; see ``worker.carry_out``."""
        folder = self.store.folder(run)
        return carry_out(run, folder, lambda: self._measure(run, folder))

    def _measure(self, run: Run, folder: RunFolder) -> bool:
        began = time.monotonic()
        unconverged = self.measurer.measure(self._subjects[run.identity])
        folder.write_result(
            {
                "identity": run.identity,
                "unconverged": unconverged,
                "seconds": round(time.monotonic() - began, 3),
            }
        )
        return True

    def should_stop(self) -> bool:
        """Never of its own accord: a signal ends it, and what is whole of its files stays."""
        return False
