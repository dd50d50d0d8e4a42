"""What the committed records of a profile hold, read once for every table and plot."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks import plan as planning
from benchmarks.errors import UserError
from benchmarks.files import sha256
from benchmarks.plan import Arm, Plan
from benchmarks.report import measurements
from benchmarks.report.measurements import Measurement
from benchmarks.run import SCHEMA, Run
from benchmarks.store import RunFolder, State, Store


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
        metrics: By identity, of finished runs: one record an epoch.
        measurements: By identity, of finished runs: what was measured on their networks.
    """

    name: str
    plan: Plan
    states: dict[str, State]
    results: dict[str, dict[str, Any]]
    reasons: dict[str, str]
    environments: dict[str, list[dict[str, Any]]]
    metrics: dict[str, list[dict[str, Any]]]
    measurements: dict[str, list[Measurement]]

    def errors(self, arm: Arm) -> dict[int, float]:
        """Test error in percent by seed, of the runs that are done."""
        return {
            seed: self.results[identity]["test_error"]
            for seed, identity in arm.runs.items()
            if identity in self.results
        }

    @cached_property
    def runs(self) -> dict[str, Run]:
        """Runs of the plan by identity."""
        return self.plan.by_identity()

    def run(self, identity: str) -> Run:
        """A run by identity."""
        return self.runs[identity]

    def lineage(self, identity: str) -> list[Run]:
        """The run and those it descends from, itself last."""
        run = self.runs[identity]
        return [*(self.lineage(run.parent) if run.parent else []), run]


def read(folder: Path) -> Results:
    """Read ``results/<profile>``.

    Raises:
        UserError: Nothing is there, or a record is of another version, edited or misplaced.
    """
    if not (folder / planning.FILE).exists():
        raise UserError(f"{folder}: no results here yet; run the profile first")
    plan = planning.read(folder / planning.FILE)
    store = Store(folder / "runs")
    _check_plan(folder / planning.FILE, plan)
    _check_folders(store.root, plan)
    states = store.states(plan)
    reasons = {}
    results: dict[str, dict[str, Any]] = {}
    environments: dict[str, list[dict[str, Any]]] = {}
    metrics: dict[str, list[dict[str, Any]]] = {}
    measured: dict[str, list[Measurement]] = {}
    for run in plan.runs:
        record, identity = store.folder(run), run.identity
        if states[identity] is State.DONE:
            results[identity] = _checked_result(record, run)
            metrics[identity] = record.metrics()
            environments[identity] = record.environments()
            measured[identity] = measurements.read(record.path, results[identity])
        elif states[identity] is State.FAILED:
            reasons[identity] = record.failure()["reason"]
    return Results(folder.name, plan, states, results, reasons, environments, metrics, measured)


def _check_plan(path: Path, plan: Plan) -> None:
    """A plan written by this project hangs together; one put together by hand may not."""
    known = plan.by_identity()
    if len(known) < len(plan.runs):
        twice = next(r for r in plan.runs if sum(o.identity == r.identity for o in plan.runs) > 1)
        raise UserError(f"{path}: duplicate run: {twice.name} is listed twice")
    for arm in plan.arms:
        place = f"{path}: {arm.dataset} {arm.backbone} {arm.augmentation} {arm.method}"
        for seed, identity in arm.runs.items():
            if identity not in known:
                raise UserError(f"{place} seed {seed}: no such run in the plan: {identity[:12]}…")
            if known[identity].settings.seed != seed:
                raise UserError(f"{place}: the run of seed {seed} has another seed")
    for run in plan.runs:
        if run.parent is not None and run.parent not in known:
            raise UserError(f"{path}: {run.name} descends from a run that is not in the plan")


def _check_folders(root: Path, plan: Plan) -> None:
    """Every folder in ``runs/`` is one run of the plan, and no run is there twice."""
    names = {run.name: run for run in plan.runs}
    for path in sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []:
        if path.name in names:
            continue
        identity = RunFolder(path).run().identity
        same = [run.name for run in plan.runs if run.identity == identity]
        if same:
            raise UserError(f"{path}: duplicate run: the same as {same[0]}; remove one of them")
        raise UserError(f"{path}: no run of this plan; remove it, or run the profile again")


def _checked_result(record: RunFolder, run: Run) -> dict[str, Any]:
    if record.run().identity != run.identity:
        raise UserError(f"{record.path}: holds another run than its name says")
    result, path = record.result(), record.path / "result.json"
    if result.get("schema") != SCHEMA:
        raise UserError(f"{path}: schema version {result.get('schema')}, this code reads {SCHEMA}")
    if result.get("identity") != run.identity:
        raise UserError(f"{path}: the result of another run than its folder's")
    metrics = record.path / "metrics.jsonl"
    if not metrics.is_file() or sha256(metrics.read_bytes()) != result["metrics_sha256"]:
        raise UserError(f"{metrics}: does not fit the result: missing, edited or damaged")
    return result
