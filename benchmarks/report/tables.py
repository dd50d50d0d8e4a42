"""Every table that people read, once, whatever page it is then set on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.reference import Published, Reference, pof_paper, sam_paper
from benchmarks.report import errors, hessian, words
from benchmarks.report.guards import Evidence, Row
from benchmarks.report.results import Results
from benchmarks.report.statistics import summarise
from benchmarks.report.verdicts import Finding, Verdict
from benchmarks.report.words import method_title, plus_minus
from benchmarks.settings import Profile
from benchmarks.store import State

# On a verdict that was reached elsewhere than in the paper's setting.
DEPARTS = "†"


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: For files and anchors.
        caption: What it shows.
        header: A title a column.
        rows: Cells as people read them.
        keys: For each row, the place that ``explain`` takes; empty where there is none.
    """

    name: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    keys: tuple[str, ...] = ()

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Columns of numbers, which are set flush right."""
        return tuple(
            any(_is_number(row[i]) for row in self.rows)
            and all(_is_number(row[i]) or row[i] in ("", "–") for row in self.rows)
            for i in range(len(self.header))
        )


def key(row: Row) -> str:
    """The place of a row: ``digits/wrn_10_1/none/sam+pof``."""
    return "/".join([*row.cell, row.arm.method])


def error_table(evidence: Evidence) -> Table:
    """Test errors of every method in every setting."""
    results = evidence.results
    rows = []
    for row in evidence.rows:
        done = [results.results[identity] for identity in row.runs.values()]
        rows.append(
            (
                *setting(row),
                method_title(row.arm.method),
                plus_minus(summarise(list(errors.errors(results, row).values()))),
                f"{len(row.runs)}/{len(results.plan.profile.seeds)}" + _state_note(results, row),
                words.mean([result["train_loss"] for result in done]),
                _published_cell(results, row),
            )
        )
    header = (
        *setting_header(evidence),
        "method",
        f"{evaluated(results.plan.profile)} error [%]",
        "n",
        "training loss",
        "published [%]",
    )
    if not any(row[-1] for row in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return Table(
        "errors",
        f"{evaluated(results.plan.profile).capitalize()} error at the last epoch: "
        "mean ± 95% t-interval over seeds",
        header,
        tuple(rows),
        tuple(key(row) for row in evidence.rows),
    )


def difference_table(evidence: Evidence) -> Table:
    """Post-trained methods against their base, paired by seed."""
    results = evidence.results
    rows, keys = [], []
    for row, base, values in errors.differences(evidence):
        rows.append(
            (
                *setting(row),
                f"{method_title(row.arm.method)} − {method_title(base.arm.method)}",
                plus_minus(summarise(list(values.values())), signed=True),
                str(len(values)),
                words.mean(losses_before(results, row)),
            )
        )
        keys.append(key(row))
    header = (
        *setting_header(evidence),
        "paired difference",
        "[percentage points]",
        "n",
        "training loss before",
    )
    caption = "Paired differences of errors: below zero, post-training has the lower one"
    return Table("differences", caption, header, tuple(rows), tuple(keys))


def hessian_table(evidence: Evidence) -> Table:
    """Largest eigenvalues and traces of what was measured."""
    rows, keys = [], []
    for line in hessian.lines(evidence):
        expected = len(evidence.results.plan.profile.seeds)
        lost = f", {len(line.unconverged)} not converged" if line.unconverged else ""
        decay = f" + {line.weight_decay:g} I" if line.weight_decay else ""
        rows.append(
            (
                *setting(line.row),
                method_title(line.row.arm.method),
                f"{line.block}, {line.matrix}{decay}",
                f"{line.split}, {line.samples:,}",
                plus_minus(line.top, 4),
                plus_minus(line.trace, 3),
                f"{line.top.n}/{expected}{lost}",
            )
        )
        keys.append(key(line.row))
    header = (
        *setting_header(evidence),
        "method",
        "block, matrix",
        "images",
        "largest eigenvalue",
        "trace",
        "n",
    )
    caption = "Curvature at the last epoch: mean ± 95% t-interval over seeds, converged ones only"
    return Table("hessian", caption, header, tuple(rows), tuple(keys))


def verdict_table(found: Sequence[Finding]) -> Table:
    """Claims that this profile speaks of, each with its verdict."""
    shown = [finding for finding in found if finding.backbone]
    rows = tuple(
        (
            finding.claim.id,
            finding.setting,
            verdict_cell(finding),
            words.measured(finding) if finding.summary.n else finding.reason,
            words.allowed(finding),
            words.compared(finding),
            f"{finding.summary.n}/{finding.expected}",
            words.detectable(finding),
            words.seeds(finding),
        )
        for finding in shown
    )
    header = (
        "claim",
        "setting",
        "verdict",
        "measured [95% interval]",
        "claim allows",
        "compared, paired by seed",
        "n",
        "detectable",
        "seeds to decide",
    )
    caption = "Verdicts on the published claims, from this profile's runs alone"
    return Table("verdicts", caption, header, rows)


def verdict_cell(finding: Finding) -> str:
    """The verdict, marked where it was reached in another setting than the paper's."""
    departs = finding.departures and finding.verdict is not Verdict.NOT_RUN
    return f"{finding.verdict} {DEPARTS}" if departs else str(finding.verdict)


def not_in_profile(found: Sequence[Finding]) -> dict[str, list[str]]:
    """Claim → data sets that it speaks of and that this profile does not have."""
    missing: dict[str, list[str]] = {}
    for finding in found:
        if not finding.backbone:
            missing.setdefault(finding.claim.id, []).append(finding.dataset)
    return missing


def setting_departures(found: Sequence[Finding]) -> dict[str, tuple[str, ...]]:
    """Setting → in what it differs from the paper's, for all that a verdict is marked with."""
    return {f.setting: f.departures for f in found if verdict_cell(f).endswith(DEPARTS)}


def cost_table(evidence: Evidence) -> Table:
    """Hours a stage and device."""
    results = evidence.results
    groups: dict[tuple[str, ...], list[tuple[float, int]]] = {}
    for run in results.plan.runs:
        if run.identity not in results.results:
            continue
        s = run.settings
        devices = dict.fromkeys(e["device"] for e in results.environments[run.identity])
        place: tuple[str, ...] = (
            s.dataset,
            s.backbone,
            s.augmentation.kind,
            method_title(run.method),
            f"{s.first_epoch}–{s.last_epoch}",
            " then ".join(devices),
        )
        spent = float(results.results[run.identity]["seconds"])
        groups.setdefault(place, []).append((spent, s.last_epoch - s.first_epoch))
    rows: list[tuple[str, ...]] = []
    for place, spent_epochs in groups.items():
        seconds = math.fsum(spent for spent, _ in spent_epochs)
        epochs = sum(count for _, count in spent_epochs)
        row = (*place, str(len(spent_epochs)), _hours(seconds), f"{seconds / epochs:.2f}")
        rows.append(row)
    if rows:
        total = math.fsum(spent for group in groups.values() for spent, _ in group)
        count = sum(len(group) for group in groups.values())
        rows.append(("all", "", "", "", "", "", str(count), _hours(total), "–"))
    header = (
        "dataset",
        "backbone",
        "augmentation",
        "method",
        "epochs",
        "device",
        "runs",
        "worker hours",
        "seconds an epoch",
    )
    caption = "Cost of training and evaluation, by stage and device"
    return Table("cost", caption, header, tuple(rows))


def environment_table(evidence: Evidence) -> Table:
    """Every machine, software and code revision that runs were made with."""
    counts: dict[tuple[str, ...], int] = {}
    for environments in evidence.results.environments.values():
        for environment in environments:
            cells = environment_cells(environment)
            counts[cells] = counts.get(cells, 0) + 1
    rows = tuple((*cells, str(count)) for cells, count in sorted(counts.items()))
    header = ("device", "threads", "precision", "torch", "timm", "Python", "code", "runs")
    return Table("environments", "What the runs were made with", header, rows)


def environment_cells(environment: dict[str, Any]) -> tuple[str, ...]:
    """Device, threads, precision, versions and code revision."""
    packages, code = environment["packages"], environment["code"]
    revision = (code["revision"] or "unknown")[:12] + (" with changes" if code["dirty"] else "")
    return (
        str(environment["device"]),
        str(environment["threads"]),
        str(environment["precision"]),
        str(packages["torch"]),
        str(packages["timm"]),
        str(environment["python"]),
        revision,
    )


def references(evidence: Evidence) -> list[Reference]:
    """The publications whose numbers stand in the error table."""
    results = evidence.results
    found = [published(results, row) for row in evidence.rows]
    titles = {reference.title: reference for _, reference in filter(None, found)}
    return list(titles.values())


def published(results: Results, row: Row) -> tuple[Published, Reference] | None:
    """The number of a publication with the row's setting: all data, as many epochs at least."""
    cell = results.plan.profile.cell(*row.cell)
    training = cell.training
    if cell.data.train_size is not None or cell.data.holdout:
        return None
    for paper in (pof_paper(), sam_paper()):
        number = paper.find(*row.cell, row.arm.method)
        enough = training.epochs + training.post_epochs >= (paper.epochs or 0)
        if number is not None and enough and training.batch_size == paper.batch_size:
            return number, paper
    return None


def evaluated(profile: Profile) -> str:
    """``test`` or ``held-out``."""
    return "held-out" if profile.data.holdout else "test"


def setting(row: Row) -> tuple[str, ...]:
    """What a row is about, before its method."""
    return (*row.cell, *(value for _, value in row.split))


def setting_header(evidence: Evidence) -> tuple[str, ...]:
    """The titles of ``setting``."""
    return ("dataset", "backbone", "augmentation", *evidence.split_by)


def _state_note(results: Results, row: Row) -> str:
    """What of the arm is not done; with split rows beside the runs of the other rows."""
    if row.arm.dataset in results.plan.unavailable:
        return f" {State.UNAVAILABLE}"
    counts: dict[str, int] = {}
    for identity in row.arm.runs.values():
        state = results.states[identity]
        if state is not State.DONE:
            counts[state] = counts.get(state, 0) + 1
    return "".join(f", {count} {state}" for state, count in sorted(counts.items()))


def _published_cell(results: Results, row: Row) -> str:
    found = published(results, row)
    return f"{found[0]} ({found[1].title})" if found else ""


def losses_before(results: Results, row: Row) -> list[float]:
    """Training losses of the networks that post-training started from."""
    parents = [results.run(identity).parent for identity in row.runs.values()]
    return [results.results[p]["train_loss"] for p in parents if p in results.results]


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:.2f}" if hours >= 0.1 else f"{hours:.4f}"


def _is_number(cell: str) -> bool:
    return cell.removeprefix("factor ").lstrip("+−<> ")[:1].isdigit()
