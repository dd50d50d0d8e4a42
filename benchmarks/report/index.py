"""``results/README.md``: every profile with results, and what each says of the claims."""

from pathlib import Path

from benchmarks.errors import UserError
from benchmarks.plan import FILE
from benchmarks.reference import claims
from benchmarks.report import page, tables, verdicts
from benchmarks.report.guards import Evidence, weigh
from benchmarks.report.pictures import FOLDER, write_if_changed
from benchmarks.report.results import read
from benchmarks.report.tables import Table
from benchmarks.report.verdicts import Finding, Verdict
from benchmarks.store import State

# What people found out from the results, in their own words: the one file here that is not made.
FINDINGS = "findings.md"
# The paper's own setting first, then the rest by name.
_FIRST = "paper"


def write_index(results_dir: Path) -> None:
    """Rebuild the index from the records of every profile and the written findings.

    A profile whose records cannot be read has a line that says so.
    """
    folders = sorted(
        (p for p in results_dir.iterdir() if (p / FILE).is_file()),
        key=lambda p: (p.name != _FIRST, p.name),
    )
    rows, sections = [], []
    for folder in folders:
        try:
            evidence = weigh(read(folder))
        except UserError as error:
            rows.append((f"[{folder.name}]({folder.name}/README.md)", "–", *[""] * len(Verdict)))
            sections.append(f"## {folder.name}\n\nCannot be reported: {error}")
            continue
        found = verdicts.findings(evidence)
        rows.append(_row(folder.name, evidence, found))
        sections.append(_section(folder, evidence, found))
    header = ("profile", "runs done", *(str(verdict) for verdict in Verdict))
    table = Table("profiles", "", header, tuple(rows))
    statements = "\n".join(f"- **{c.id}**: {c.statement} ({c.source})" for c in claims())
    findings = results_dir / FINDINGS
    parts = [
        "# Results",
        "What was run, and what it says of the published claims. Every page here is rebuilt from "
        "the records in its `runs/` by `make report`.",
        page.markdown(table),
        *([findings.read_text(encoding="utf-8").strip()] if findings.is_file() else []),
        f"## The claims\n\n{statements}",
        page.verdict_reading(),
        *sections,
    ]
    write_if_changed(results_dir / "README.md", "\n\n".join(parts) + "\n")


def _row(name: str, evidence: Evidence, found: list[Finding]) -> tuple[str, ...]:
    states = evidence.results.states.values()
    done = sum(state is State.DONE for state in states)
    counts = verdicts.tally(found)
    return (
        f"[{name}]({name}/README.md)",
        f"{done}/{len(states)}",
        *(str(counts[verdict]) for verdict in Verdict),
    )


def _section(folder: Path, evidence: Evidence, found: list[Finding]) -> str:
    """A profile in short: its verdicts, its errors, its plot of differences."""
    name, title = folder.name, evidence.results.plan.profile.title
    verdict = tables.verdict_table(found)
    picture = folder / FOLDER / "differences.svg"
    parts = [
        f"## {title}",
        f"[Tables, plots and runs]({name}/README.md) · [one page]({name}/report.html)",
        page.markdown(verdict) if verdict.rows else "",
        "\n\n".join(page.verdict_notes(found)),
        page.markdown(tables.error_table(evidence)),
        f"![Paired differences of test errors of {name}; the numbers are in its tables]"
        f"({name}/{FOLDER}/differences.svg)"
        if picture.is_file()
        else "",
    ]
    return "\n\n".join(part for part in parts if part)
