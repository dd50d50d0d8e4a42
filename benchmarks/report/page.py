"""``README.md`` of a profile's results: the table, what it means, and what is missing."""

import math
from collections.abc import Sequence
from typing import Any

from benchmarks.plan import Arm
from benchmarks.reference import sam_paper
from benchmarks.report.errors import difference, paired_arms
from benchmarks.report.results import Results
from benchmarks.report.statistics import Summary, summarise
from benchmarks.settings import Profile
from benchmarks.store import State

_NAMES = {"sgd": "SGD", "sam": "SAM"}


def method_title(method: str) -> str:
    """``sam+pof-centred`` as people write it: SAM+PoF-centred."""
    base, _, variant = method.partition("+")
    second = "+" + variant.replace("pof", "PoF") if variant else ""
    return _NAMES[base] + second


def page(results: Results) -> str:
    """The whole page."""
    profile = results.plan.profile
    parts = [
        f"# {profile.title}",
        profile.description.strip(),
        tables(results),
        _reading(results),
        _missing(results),
        _warnings(results),
        _settings(profile),
        _made(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def tables(results: Results) -> str:
    """The error table and the paired differences, in Markdown that also reads as plain text."""
    return "\n\n".join(part for part in (_error_table(results), _difference_table(results)) if part)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned Markdown table; all but text columns are right-aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    left = [
        not any(any(c.isdigit() for c in row[i][:2]) for row in rows) for i in range(len(header))
    ]
    lines = [
        "| "
        + " | ".join(_pad(cell, w, a) for cell, w, a in zip(row, widths, left, strict=True))
        + " |"
        for row in [header, *rows]
    ]
    rule = "|".join("-" * (w + 1) + ("-" if a else ":") for w, a in zip(widths, left, strict=True))
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def _is_number(cell: str) -> bool:
    return cell.lstrip("+−")[:1].isdigit()


def _pad(cell: str, width: int, left: bool) -> str:
    return cell.ljust(width) if left else cell.rjust(width)


def plus_minus(summary: Summary, digits: int = 2, *, signed: bool = False) -> str:
    """``15.23 ± 0.31``; without an interval below two seeds, – without any."""
    if summary.n == 0:
        return "–"
    mean = f"{summary.mean:{'+' if signed else ''}.{digits}f}".replace("-", "−")
    return mean if math.isnan(summary.ci95) else f"{mean} ± {summary.ci95:.{digits}f}"


def _evaluated(profile: Profile) -> str:
    return "held-out error" if profile.data.holdout else "test error"


def _error_table(results: Results) -> str:
    profile = results.plan.profile
    rows = []
    for arm in results.plan.arms:
        errors = results.errors(arm)
        done = [results.results[i] for i in arm.runs.values() if i in results.results]
        rows.append(
            [
                arm.dataset,
                arm.backbone,
                arm.augmentation,
                method_title(arm.method),
                plus_minus(summarise(list(errors.values()))),
                f"{len(errors)}/{len(profile.seeds)}" + _state_note(results, arm),
                _mean([result["train_loss"] for result in done]),
                _published(results, arm),
            ]
        )
    header = [
        "dataset",
        "backbone",
        "augmentation",
        "method",
        f"{_evaluated(profile)} [%]",
        "n",
        "training loss",
        "published [%]",
    ]
    if not any(row[-1] for row in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return markdown_table(header, rows)


def _state_note(results: Results, arm: Arm) -> str:
    if arm.dataset in results.plan.unavailable:
        return " UNAVAILABLE"
    counts: dict[str, int] = {}
    for identity in arm.runs.values():
        state = results.states[identity]
        if state is not State.DONE:
            counts[state] = counts.get(state, 0) + 1
    return "".join(f", {count} {state}" for state, count in sorted(counts.items()))


def _published(results: Results, arm: Arm) -> str:
    """The SAM paper's number where the arm has its setting: all the data, WRN-28-10."""
    cell = results.plan.profile.cell(arm.dataset, arm.backbone, arm.augmentation)
    if cell.data.train_size is not None or cell.data.holdout:
        return ""
    for row in sam_paper().error:
        same = (row.dataset, row.backbone, row.augmentation)
        if same == (arm.dataset, arm.backbone, arm.augmentation) and arm.method in ("sam", "sgd"):
            number = row.sam if arm.method == "sam" else row.sgd
            return f"{number.mean:g} ± {number.ci95:g}"
    return ""


def _difference_table(results: Results) -> str:
    rows = []
    for arm, base in paired_arms(results.plan.arms):
        summary = difference(results, arm, base)
        rows.append(
            [
                arm.dataset,
                arm.backbone,
                arm.augmentation,
                f"{method_title(arm.method)} − {method_title(base.method)}",
                plus_minus(summary, signed=True),
                str(summary.n),
                _mean(_losses_before(results, arm)),
            ]
        )
    if not rows:
        return ""
    header = [
        "dataset",
        "backbone",
        "augmentation",
        "paired difference",
        "[percentage points]",
        "n",
        "training loss before",
    ]
    return markdown_table(header, rows)


def _losses_before(results: Results, arm: Arm) -> list[float]:
    """Training losses of the networks that post-training started from."""
    parents = [results.run(identity).parent for identity in arm.runs.values()]
    return [results.results[p]["train_loss"] for p in parents if p in results.results]


def _mean(values: Sequence[float]) -> str:
    return f"{math.fsum(values) / len(values):.4f}" if values else "–"


def _reading(results: Results) -> str:
    profile = results.plan.profile
    what = "the held-out part of the training set" if profile.data.holdout else "the test set"
    text = (
        f"Errors are on {what}, at the last epoch, never the best one. ± is the half-width of the "
        "95% t-interval over seeds (sample standard deviation); n counts the seeds that are done "
        "of those planned. Arms are paired by seed: both start from the same checkpoint, and a "
        "difference below zero means that post-training has the lower error. The training loss is "
        "the mean over the last epoch's batches in training mode. Every seed's value is in "
        "[errors.csv](errors.csv), every run's record in [runs/](runs/)."
    )
    if any(_published(results, arm) for arm in results.plan.arms):
        paper = sam_paper()
        text += (
            f" Published: {paper.citation}, ± {paper.plus_minus}; its setting differs in: "
            f"{paper.differs}."
        )
    return text


def _missing(results: Results) -> str:
    lines = []
    for run in results.plan.runs:
        state = results.states[run.identity]
        if state is not State.DONE:
            reason = results.reasons.get(run.identity, "")
            lines.append(f"- {state}: {run.label}" + (f": {reason}" if reason else ""))
    for dataset, reason in results.plan.unavailable.items():
        lines.append(f"- {State.UNAVAILABLE}: {dataset}: {reason}")
    return "\n".join(["## Missing", "", *lines]) if lines else ""


def _warnings(results: Results) -> str:
    lines = []
    for run in results.plan.runs:
        result = results.results.get(run.identity, {})
        if result.get("runaway"):
            lines.append(f"- {run.label}: post-training ran away (ξ* and cos(ĝ, mean) grew)")
        if result.get("capped_share", 0.0) > 0:
            lines.append(
                f"- {run.label}: {100 * result['capped_share']:.1f}% of the ranges reached the cap"
            )
        lines += [f"- {run.label}: {warning}" for warning in result.get("warnings", [])]
    return "\n".join(["## Warnings", "", *lines]) if lines else ""


def _settings(profile: Profile) -> str:
    data, training = profile.data, profile.training
    size = f"{data.train_size:,} training images" if data.train_size else "all training images"
    optimizer, schedule = profile.optimizer, profile.schedule
    total = training.epochs + training.post_epochs
    shape = {
        "step": f"× {schedule.factor:g} at epochs {', '.join(map(str, schedule.milestones))}",
        "cosine": f"cosine over {total} epochs",
        "constant": "constant",
    }[schedule.kind]
    lines = [
        f"- {size}, batch {training.batch_size}, {training.precision}",
        f"- {training.epochs} epochs of the base method, then {training.post_epochs} of PoF or of "
        f"the base method continued; seeds {', '.join(map(str, profile.seeds))}",
        f"- learning rate {optimizer.learning_rate:g}, {shape}; momentum {optimizer.momentum:g}"
        f"{' (Nesterov)' if optimizer.nesterov else ''}, weight decay {optimizer.weight_decay:g}",
        f"- SAM ρ = {profile.sam.rho:g}; PoF γ = {profile.pof.gamma:g}, direction "
        f"{profile.pof.direction}, {profile.pof.search} search, cap {profile.pof.cap:g} "
        f"({profile.pof.cap_unit}), capped batches: {profile.pof.capped}",
        *_differences(profile),
        "- every setting of every run: [plan.json](plan.json)",
    ]
    return "\n".join(["## Settings", "", *lines])


def _differences(profile: Profile) -> list[str]:
    """A line for each override and each post-training method of the profile's own."""
    lines = []
    for override in profile.override:
        where = ", ".join(override.where.model_dump(exclude_none=True).values())
        tables = override.model_dump(exclude={"where"})
        changes = [f"{t}.{k} = {v}" for t, table in tables.items() for k, v in table.items()]
        lines.append(f"- for {where}: {', '.join(changes)}")
    for name, settings in profile.variants.items():
        differs = ", ".join(f"{key} = {value}" for key, value in settings.items())
        lines.append(f"- +{name} is +pof with {differs}")
    return lines


def _made(results: Results) -> str:
    """Machines, software and cost."""
    if not results.results:
        return ""
    found: dict[str, int] = {}
    for environments in results.environments.values():
        for environment in environments:
            line = environment_line(environment)
            found[line] = found.get(line, 0) + 1
    seconds = math.fsum(result["seconds"] for result in results.results.values())
    lines = [f"- {line} ({count} runs)" for line, count in sorted(found.items())]
    lines.append(f"- {seconds / 3600:.2f} worker hours of training and evaluation in all")
    return "\n".join(["## Made on", "", *lines])


def environment_line(environment: dict[str, Any]) -> str:
    """Device, software and code revision in one line."""
    packages = environment["packages"]
    code = environment["code"]
    revision = (code["revision"] or "unknown")[:12] + (" with changes" if code["dirty"] else "")
    return (
        f"{environment['device']}, {environment['threads']} thread(s) a run, "
        f"{environment['precision']}, torch {packages['torch']}, timm {packages['timm']}, "
        f"Python {environment['python']}, code {revision}"
    )
