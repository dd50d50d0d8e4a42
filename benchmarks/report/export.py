"""``export``: the tables for a paper, in LaTeX and Markdown, and one tidy CSV of all runs."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from benchmarks.report import page, regime, tables, verdicts
from benchmarks.report.guards import weigh
from benchmarks.report.pictures import csv, write_if_changed
from benchmarks.report.provenance import run_records
from benchmarks.report.results import read
from benchmarks.report.tables import Table

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
    "±": r"$\pm$",
    "−": r"$-$",
    "×": r"$\times$",
    "÷": r"$\div$",
    "λ": r"$\lambda$",
    "ĝ": r"$\hat{g}$",
    "₁": r"$_1$",
    "ξ": r"$\xi$",
    "γ": r"$\gamma$",
    "ρ": r"$\rho$",
    "–": "--",
    "†": r"$^\dagger$",
    "“": "``",
    "”": "''",
}


def export(folder: Path, target: Path, *, split_by: Sequence[str] = ()) -> list[Path]:
    """Write ``<table>.tex`` and ``<table>.md`` for every table with rows, and ``runs.csv``.

    Args:
        folder: ``results/<profile>``.
        target: Where to.
        split_by: As for the report.

    Returns:
        The files.
    """
    evidence = weigh(read(folder), split_by)
    made = [
        tables.error_table(evidence),
        tables.difference_table(evidence),
        regime.table(evidence),
        tables.hessian_table(evidence),
        tables.verdict_table(verdicts.findings(evidence)),
        tables.cost_table(evidence),
    ]
    texts = {"runs.csv": csv(pd.DataFrame(list(run_records(evidence.results))))}
    for table in made:
        if table.rows:
            texts[f"{table.name}.tex"] = latex(table)
            texts[f"{table.name}.md"] = page.markdown(table) + "\n"
    for name, text in texts.items():
        write_if_changed(target / name, text)
    return [target / name for name in texts]


def latex(table: Table) -> str:
    """A ``table`` for ``booktabs``; columns that say the same in every row are left out."""
    varying = [
        i
        for i in range(len(table.header))
        if len(table.rows) == 1 or len({row[i] for row in table.rows}) > 1
    ]
    constant = [i for i in range(len(table.header)) if i not in varying]
    said = ", ".join(f"{table.header[i]} {table.rows[0][i]}" for i in constant if table.rows[0][i])
    caption = escape(f"{table.caption}." + (f" Throughout: {said}." if said else ""))
    columns = "".join("r" if table.numeric[i] else "l" for i in varying)

    def line(cells: Sequence[str]) -> str:
        return "  " + " & ".join(escape(cells[i]) for i in varying) + r" \\"

    return "\n".join(
        [
            "% needs \\usepackage{booktabs}",
            r"\begin{table}",
            r"  \centering",
            f"  \\caption{{{caption}}}",
            f"  \\label{{tab:{table.name}}}",
            f"  \\begin{{tabular}}{{{columns}}}",
            r"  \toprule",
            line(table.header),
            r"  \midrule",
            *(line(row) for row in table.rows),
            r"  \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def escape(text: str) -> str:
    """Text as LaTeX sets it."""
    return "".join(_LATEX.get(character, character) for character in text)
