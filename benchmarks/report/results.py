"""What the committed records of a profile hold, read once for every table and plot."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import plan as planning
from benchmarks.errors import UserError
from benchmarks.files import read_json
from benchmarks.plan import Arm, Plan
from benchmarks.run import Run
from benchmarks.store import State, Store


@dataclass(frozen=True)
class Results:
    """A profile's plan and what came of it.

    Attributes:
        name: Of the profile.
        plan: What was asked for.
        states: By identity.
        results: By identity, of finished runs.
        reasons: By identity, of failed runs.
        environments: By identity, of finished runs: one entry a machine or code revision.
    """

    name: str
    plan: Plan
    states: dict[str, State]
    results: dict[str, dict[str, Any]]
    reasons: dict[str, str]
    environments: dict[str, list[dict[str, Any]]]

    def errors(self, arm: Arm) -> dict[int, float]:
        """Test error in percent by seed, of the runs that are done."""
        return {
            seed: self.results[identity]["test_error"]
            for seed, identity in arm.runs.items()
            if identity in self.results
        }

    def run(self, identity: str) -> Run:
        """A run by identity."""
        return self.plan.by_identity()[identity]


def read(folder: Path) -> Results:
    """Read ``results/<profile>``.

    Raises:
        UserError: Nothing is there, or a record is of another version, edited or misplaced.
    """
    if not (folder / planning.FILE).exists():
        raise UserError(f"{folder}: no results here yet; run the profile first")
    plan = planning.read(folder / planning.FILE)
    store = Store(folder / "runs")
    states = store.states(plan)
    results, reasons, environments = {}, {}, {}
    for run in plan.runs:
        record = store.folder(run)
        if states[run.identity] is State.DONE:
            if record.run().identity != run.identity:
                raise UserError(f"{record.path}: holds another run than its name says")
            results[run.identity] = record.result()
            segments = read_json(record.path / "environment.json")["segments"]
            environments[run.identity] = [segment["environment"] for segment in segments]
        elif states[run.identity] is State.FAILED:
            reasons[run.identity] = record.failure()["reason"]
    return Results(folder.name, plan, states, results, reasons, environments)
