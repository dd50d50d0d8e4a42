"""``README.md`` of a profile's results: verdicts, tables, plots, and what is missing."""

from collections.abc import Sequence

from benchmarks.report import regime, tables
from benchmarks.report.guards import Evidence
from benchmarks.report.pictures import FOLDER, Picture
from benchmarks.report.tables import Table
from benchmarks.report.verdicts import UNDECIDED, Finding
from benchmarks.settings import Profile
from benchmarks.store import State


def page(evidence: Evidence, found: Sequence[Finding], pictures: Sequence[Picture]) -> str:
    """The whole page."""
    profile = evidence.results.plan.profile
    hessian = tables.hessian_table(evidence)
    parts = [
        f"# {profile.title}",
        profile.description.strip(),
        "Everything on one page, to download and browse: [report.html](report.html).",
        _verdicts(found),
        _errors(evidence),
        _regime(evidence),
        f"## Curvature\n\n{markdown(hessian)}" if hessian.rows else "",
        *(_picture(picture) for picture in pictures),
        _section("Missing", missing(evidence)),
        _section("Warnings", warnings(evidence)),
        _section("Settings", settings(profile)),
        _made(evidence),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def terminal(evidence: Evidence, found: Sequence[Finding]) -> str:
    """What a terminal shows: the tables of errors, and the verdicts in a line each."""
    parts = [markdown(tables.error_table(evidence))]
    differences = tables.difference_table(evidence)
    if differences.rows:
        parts.append(markdown(differences))
    lines = [
        f"claim {finding.claim.id}, {finding.setting}: {tables.verdict_cell(finding)}"
        + (f" ({finding.reason})" if finding.verdict in UNDECIDED else "")
        for finding in found
        if finding.backbone
    ]
    if any(tables.DEPARTS in line for line in lines):
        lines.append(f"{tables.DEPARTS} not the paper's setting")
    return "\n\n".join([*parts, "\n".join(lines)] if lines else parts)


def markdown(table: Table) -> str:
    """An aligned Markdown table, which also reads as plain text."""
    rows = [tuple(cell.replace("|", "\\|") for cell in row) for row in table.rows]
    widths = [max(len(row[i]) for row in [table.header, *rows]) for i in range(len(table.header))]
    right = table.numeric

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(cells, widths, right, strict=True)
        ]
        return "| " + " | ".join(padded) + " |"

    rule = "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True))
    return "\n".join([line(table.header), f"|{rule}|", *map(line, rows)])


def verdict_notes(found: Sequence[Finding]) -> list[str]:
    """What the verdict table leaves out, a line each."""
    lines = [
        f"{tables.DEPARTS} {setting} is not the paper's setting: {'; '.join(departures)}."
        for setting, departures in tables.setting_departures(found).items()
    ]
    absent = tables.not_in_profile(found)
    if absent:
        said = "; ".join(f"{claim} on {', '.join(names)}" for claim, names in absent.items())
        lines.append(f"NOT RUN, because not in this profile: {said}.")
    return lines


def verdict_reading() -> str:
    """How a verdict comes about."""
    return (
        "REPRODUCED: the 95% t-interval of the paired effect lies within what the claim allows "
        "(for a value: two one-sided tests); CONTRADICTED: wholly outside; both after Holm's "
        "correction over the settings of a claim. INCONCLUSIVE: it holds values of either kind; "
        "one seed never decides. Detectable: the smallest true effect that this n would have "
        "found in 80% of cases. Seeds to decide: how many would decide in 80% of cases if this "
        "mean and spread were the true ones."
    )


def reading(evidence: Evidence) -> str:
    """What the numbers of the error table are."""
    profile = evidence.results.plan.profile
    what = "the held-out part of the training set" if profile.data.holdout else "the test set"
    text = (
        f"Errors are on {what}, at the last epoch, never the best one. ± is the half-width of the "
        "95% t-interval over seeds (sample standard deviation); n counts the seeds that are done "
        "of those planned. Arms are paired by seed: both start from the same checkpoint, and a "
        "difference below zero means that post-training has the lower error. The training loss is "
        "the mean over the last epoch's batches in training mode."
    )
    for paper in tables.references(evidence):
        text += f" Published: {paper.title}: {paper.citation}, ± {paper.plus_minus}"
        text += f"; its setting differs in: {paper.differs}." if paper.differs else "."
    return text


def missing(evidence: Evidence) -> list[str]:
    """A line for every run that is not done and every data set that could not be had."""
    results = evidence.results
    lines = []
    for run in results.plan.runs:
        state = results.states[run.identity]
        if state is not State.DONE:
            reason = results.reasons.get(run.identity, "")
            lines.append(f"{state}: {run.label}" + (f": {reason}" if reason else ""))
    for dataset, reason in results.plan.unavailable.items():
        lines.append(f"{State.UNAVAILABLE}: {dataset}: {reason}")
    return lines


def warnings(evidence: Evidence) -> list[str]:
    """A line for everything about a finished run that a reader should know."""
    results = evidence.results
    lines = []
    for run in results.plan.runs:
        result = results.results.get(run.identity, {})
        if result.get("runaway"):
            lines.append(f"{run.label}: post-training ran away (ξ* and cos(ĝ, mean) grew)")
        if result.get("capped_share", 0.0) > 0:
            lines.append(
                f"{run.label}: {100 * result['capped_share']:.1f}% of the ranges reached the cap"
            )
        lines += [f"{run.label}: {warning}" for warning in result.get("warnings", [])]
    return lines


def settings(profile: Profile) -> list[str]:
    """The settings that matter most, a line each."""
    data, training = profile.data, profile.training
    size = f"{data.train_size:,} training images" if data.train_size else "all training images"
    optimizer, schedule = profile.optimizer, profile.schedule
    total = training.epochs + training.post_epochs
    shape = {
        "step": f"× {schedule.factor:g} at epochs {', '.join(map(str, schedule.milestones))}",
        "cosine": f"cosine over {total} epochs",
        "constant": "constant",
    }[schedule.kind]
    return [
        f"{size}, batch {training.batch_size}, {training.precision}",
        f"{training.epochs} epochs of the base method, then {training.post_epochs} of PoF or of "
        f"the base method continued; seeds {', '.join(map(str, profile.seeds))}",
        f"learning rate {optimizer.learning_rate:g}, {shape}; momentum {optimizer.momentum:g}"
        f"{' (Nesterov)' if optimizer.nesterov else ''}, weight decay {optimizer.weight_decay:g}",
        f"SAM ρ = {profile.sam.rho:g}; PoF γ = {profile.pof.gamma:g}, direction "
        f"{profile.pof.direction}, {profile.pof.search} search, cap {profile.pof.cap:g} "
        f"({profile.pof.cap_unit}), capped batches: {profile.pof.capped}",
        *_overrides(profile),
    ]


def _overrides(profile: Profile) -> list[str]:
    """A line for each override and each post-training method of the profile's own."""
    lines = []
    for override in profile.override:
        where = ", ".join(override.where.model_dump(exclude_none=True).values())
        changed = override.model_dump(exclude={"where"})
        changes = [f"{t}.{k} = {v}" for t, table in changed.items() for k, v in table.items()]
        lines.append(f"for {where}: {', '.join(changes)}")
    for name, differing in profile.variants.items():
        differs = ", ".join(f"{key} = {value}" for key, value in differing.items())
        lines.append(f"+{name} is +pof with {differs}")
    for name, terms in profile.continued.items():
        own = ", ".join(f"{k} = {v}" for k, v in terms.model_dump(exclude_none=True).items())
        lines.append(f"+{name} is the base method continued with {own or 'nothing changed'}")
    return lines


def _verdicts(found: Sequence[Finding]) -> str:
    table = tables.verdict_table(found)
    parts = ["## Verdicts"]
    if table.rows:
        parts.append(markdown(table))
    parts += verdict_notes(found)
    if table.rows:
        parts.append(f"{verdict_reading()} All of it: [claims.csv](claims.csv).")
    return "\n\n".join(parts)


def _errors(evidence: Evidence) -> str:
    differences = tables.difference_table(evidence)
    parts = [
        "## Errors",
        markdown(tables.error_table(evidence)),
        markdown(differences) if differences.rows else "",
        f"{reading(evidence)} Every seed's value is in [errors.csv](errors.csv)"
        f"{' and [differences.csv](differences.csv)' if differences.rows else ''}, "
        "every run's record in [runs/](runs/).",
    ]
    return "\n\n".join(part for part in parts if part)


def _regime(evidence: Evidence) -> str:
    table = regime.table(evidence)
    if not table.rows:
        return ""
    more = "All of it: [post-training.csv](post-training.csv)."
    return f"## What post-training did\n\n{markdown(table)}\n\n{regime.READING} {more}"


def _picture(picture: Picture) -> str:
    alt = picture.alt.replace("[", "(").replace("]", ")")
    return (
        f"## {picture.title}\n\n![{alt}]({FOLDER}/{picture.file})\n\n{picture.caption} "
        f"Numbers: [{picture.data}]({FOLDER}/{picture.data})."
    )


def _section(title: str, lines: Sequence[str]) -> str:
    if not lines:
        return ""
    listed = [f"- {line}" for line in lines]
    if title == "Settings":
        listed.append("- every setting of every run: [plan.json](plan.json)")
    return "\n".join([f"## {title}", "", *listed])


def _made(evidence: Evidence) -> str:
    """Machines, software and cost."""
    environments, cost = tables.environment_table(evidence), tables.cost_table(evidence)
    if not cost.rows:
        return ""
    return f"## Made on\n\n{markdown(environments)}\n\n## Cost\n\n{markdown(cost)}"
