"""``explain``: the runs behind a number, each with all that could have moved it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from benchmarks.errors import UserError
from benchmarks.report import words
from benchmarks.report.errors import errors
from benchmarks.report.guards import Row, weigh
from benchmarks.report.measurements import Hessian
from benchmarks.report.results import Results, read
from benchmarks.report.statistics import summarise
from benchmarks.report.tables import key
from benchmarks.run import Run, RunSettings
from benchmarks.store import State


@dataclass(frozen=True)
class Choice:
    """Which rows are meant: all that match what is given.

    Attributes:
        cell: A row's place as the pages give it: ``digits/wrn_10_1/none/sam+pof``.
        dataset: Name.
        backbone: Name.
        augmentation: Name.
        method: An arm (``sam+pof``), or what follows the plus (``pof``: every arm with it).
        seed: One only.
    """

    cell: str | None = None
    dataset: str | None = None
    backbone: str | None = None
    augmentation: str | None = None
    method: str | None = None
    seed: int | None = None

    def matches(self, row: Row) -> bool:
        """Whether a row is meant."""
        arm = row.arm
        return (
            self.cell in (None, key(row))
            and self.dataset in (None, arm.dataset)
            and self.backbone in (None, arm.backbone)
            and self.augmentation in (None, arm.augmentation)
            and self.method in (None, arm.method, arm.method.partition("+")[2])
        )


def results_folder(path: Path) -> Path:
    """``results/<profile>`` of a table, a page, a plot or the folder itself.

    Raises:
        UserError: There is no such thing.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    for folder in (path, *path.resolve().parents[:3]):
        if (folder / "plan.json").is_file():
            return folder
    raise UserError(f"{path}: not in a results folder (none with a plan.json around it)")


def explain(path: Path, choice: Choice) -> str:
    """What stands behind the chosen rows, as text.

    Args:
        path: A file of ``results/<profile>``, or the folder.
        choice: Which rows.

    Raises:
        UserError: Nothing matches, or a record is broken.
    """
    results = read(results_folder(path))
    split_by = ("device", "torch", "timm", "precision", "threads", "data", "ascent-batch")
    rows = [row for row in weigh(results, split_by).rows if choice.matches(row)]
    if not rows:
        places = dict.fromkeys(key(Row(arm, {})) for arm in results.plan.arms)
        raise UserError(f"{path}: no such row; there are: {', '.join(places)}")
    merged: dict[str, Row] = {}
    for row in rows:  # what may not be averaged is listed all the same
        others = merged[key(row)].runs if key(row) in merged else {}
        merged[key(row)] = Row(row.arm, dict(sorted((others | row.runs).items())))
    return "\n\n".join("\n".join(_row(results, row, choice.seed)) for row in merged.values())


def _row(results: Results, row: Row, only: int | None) -> Iterator[str]:
    planned = results.plan.profile.seeds
    summary = summarise(list(errors(results, row).values()))
    yield (
        f"{key(row)}: error {words.plus_minus(summary)}% "
        f"(95% t-interval over seeds, {summary.n} of {len(planned)} done)"
    )
    shared: list[RunSettings] = []
    for seed, identity in row.arm.runs.items():
        if only not in (None, seed):
            continue
        run = results.run(identity)
        yield ""
        if identity not in results.results:
            reason = results.reasons.get(identity, "")
            yield f"seed {seed}: {results.states[identity]}" + (f": {reason}" if reason else "")
            continue
        yield f"seed {seed}: error {results.results[identity]['test_error']:.4f}%"
        for step in results.lineage(identity):
            yield from (f"  {line}" for line in _run(results, step))
        shared.append(run.settings)
    if not row.arm.runs:
        yield f"  {State.UNAVAILABLE}: {results.plan.unavailable.get(row.arm.dataset, '')}"
    if shared:
        yield ""
        yield "settings of the last stage (seed aside):"
        settings = TypeAdapter(RunSettings).dump_python(shared[0], mode="json")
        yield from (f"  {name} = {value}" for name, value in _leaves(settings) if name != "seed")


def _run(results: Results, run: Run) -> Iterator[str]:
    result = results.results.get(run.identity)
    yield f"runs/{run.name}"
    if result is None:
        yield f"  {results.states[run.identity]}"
        return
    parent = result.get("parent") or {}
    yield f"  identity {run.identity}"
    if parent:
        yield f"  starts from checkpoint {parent['checkpoint_sha256']} of {parent['identity']}"
    yield f"  weights {result.get('weights_sha256', 'not recorded')}"
    yield f"  data {run.settings.dataset} {run.settings.fingerprint}"
    for environment in results.environments[run.identity]:
        yield from _environment(environment)
    starts = result.get("starts", 1)
    restarts = f", {starts - 1} restarts" if starts > 1 else ""
    share = ", this run's share" if "at_once" in result else ""
    yield f"  {result['seconds']:.0f} s of wall time{share}{restarts}"
    for how, said in (("compiled", "compiled"), ("at_once", "at once with other seeds")):
        if how in result:
            yield f"  trained {said}: bits {result[how]['bits']}"
    for measurement in results.measurements[run.identity]:
        if isinstance(measurement, Hessian):
            top = measurement.top_eigenvalue
            found = "not converged" if top is None else f"{top:.6g}"
            yield f"  measured {measurement.file}: largest eigenvalue {found}"
        else:
            yield f"  measured {measurement.file}"
    if result.get("runaway"):
        yield "  warning: post-training ran away"
    if result.get("capped_share"):
        yield f"  warning: {100 * result['capped_share']:.1f}% of the ranges reached the cap"
    yield from (f"  warning: {warning}" for warning in result.get("warnings", []))


def _environment(environment: dict[str, Any]) -> Iterator[str]:
    code = environment["code"]
    state = {True: "with uncommitted changes", False: "clean", None: "state unknown"}[code["dirty"]]
    yield f"  code {code['revision'] or 'unknown'}, {state}"
    yield (
        f"  device {environment['device']}, {environment['threads']} threads, "
        f"{environment['precision']}, Python {environment['python']}"
    )
    packages = environment["packages"]
    yield "  packages " + ", ".join(f"{name} {packages[name]}" for name in sorted(packages))
    slurm = environment.get("slurm") or {}
    if slurm:
        yield "  Slurm " + ", ".join(f"{name} {value}" for name, value in sorted(slurm.items()))


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def run_records(results: Results) -> Iterator[dict[str, Any]]:
    """A flat record of every run of the plan, for the tidy table."""
    for run in results.plan.runs:
        s = run.settings
        result = results.results.get(run.identity, {})
        environment = (results.environments.get(run.identity) or [{}])[-1]
        record: dict[str, Any] = {
            "run": run.name,
            "state": str(results.states[run.identity]),
            "dataset": s.dataset,
            "backbone": s.backbone,
            "augmentation": s.augmentation.kind,
            "method": run.method,
            "algorithm": s.algorithm,
            "seed": s.seed,
            "first_epoch": s.first_epoch,
            "last_epoch": s.last_epoch,
        }
        for name in ("test_error", "test_loss", "train_error", "train_loss", "seconds"):
            record[name] = float(result.get(name, math.nan))
        record["starts"] = result.get("starts", "")
        record["capped_share"] = float(result.get("capped_share", math.nan))
        record["runaway"] = result.get("runaway", "")
        tops = {
            m.split: m.top_eigenvalue
            for m in results.measurements.get(run.identity, [])
            if isinstance(m, Hessian) and (m.block, m.matrix) == ("classifier", "hessian")
        }
        for split in ("train", "test"):
            top = tops.get(split)
            record[f"top_eigenvalue_{split}"] = math.nan if top is None else top
        record["device"] = environment.get("device", "")
        record["torch"] = environment.get("packages", {}).get("torch", "")
        record["code"] = environment.get("code", {}).get("revision") or ""
        record["dirty"] = environment.get("code", {}).get("dirty", "")
        record["identity"] = run.identity
        record["parent"] = run.parent or ""
        record["fingerprint"] = s.fingerprint
        yield record
