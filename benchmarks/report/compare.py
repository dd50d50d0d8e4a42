"""``compare``: in which settings and results two profiles, or two result folders, differ."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.errors import UserError
from benchmarks.plan import FILE
from benchmarks.report import words
from benchmarks.report.errors import errors
from benchmarks.report.guards import FIELDS, Row, title, value
from benchmarks.report.results import Results, read
from benchmarks.report.statistics import summarise
from benchmarks.settings import Profile, load_profile

_UNSET = "–"


def compare(first: str, second: str, results_dir: Path) -> str:
    """The differences as text.

    Args:
        first: A results folder, a profile's name or its TOML file.
        second: The same.
        results_dir: Where the results of named profiles are.

    Raises:
        UserError: One of them is none of these.
    """
    (a, results_a), (b, results_b) = (_open(name, results_dir) for name in (first, second))
    parts = [_section("settings", _settings(a, b, first, second))]
    if results_a is None or results_b is None:
        lacking = [n for n, r in ((first, results_a), (second, results_b)) if r is None]
        parts.append(f"results: none of {' and '.join(lacking)}")
    else:
        parts.append(_section("environments", _environments(results_a, results_b)))
        parts.append(_section("runs", _runs(results_a, results_b)))
        parts.append(_section("errors [%]", _errors(results_a, results_b)))
    return "\n\n".join(parts)


def _open(name: str, results_dir: Path) -> tuple[Profile, Results | None]:
    if (Path(name) / FILE).is_file():
        results = read(Path(name))
        return results.plan.profile, results
    if Path(name).is_dir():
        raise UserError(f"{name}: no results here: it has no {FILE}")
    profile = load_profile(name)
    folder = results_dir / name
    return profile, read(folder) if (folder / FILE).is_file() else None


def _section(heading: str, lines: list[str]) -> str:
    return "\n".join([f"{heading}:", *(f"  {line}" for line in lines or ["no difference"])])


def _settings(a: Profile, b: Profile, first: str, second: str) -> list[str]:
    ours, theirs = (
        dict(_leaves(a.model_dump(mode="json"))),
        dict(_leaves(b.model_dump(mode="json"))),
    )
    skipped = {"title", "description"}
    names = [name for name in ours | theirs if name not in skipped]
    return [
        f"{name}: {first} {ours.get(name, _UNSET)}, {second} {theirs.get(name, _UNSET)}"
        for name in names
        if ours.get(name, _UNSET) != theirs.get(name, _UNSET)
    ]


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, leaf in tree.items():
        if isinstance(leaf, dict) and leaf:
            yield from _leaves(leaf, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", leaf


def _environments(a: Results, b: Results) -> list[str]:
    lines = []
    for field in FIELDS:
        ours, theirs = _found(a, field), _found(b, field)
        if ours != theirs:
            said = (" | ".join(sorted(values)) or _UNSET for values in (ours, theirs))
            lines.append("{}: {} against {}".format(title(field), *said))
    return lines


def _found(results: Results, field: str) -> set[str]:
    return {value(results, identity, field) for identity in results.results} - {""}


def _runs(a: Results, b: Results) -> list[str]:
    """Runs that both have: the same settings, so on the same machine the same bits."""
    lines = []
    shared = [identity for identity in a.results if identity in b.results]
    for identity in shared:
        ours, theirs = a.results[identity], b.results[identity]
        if ours.get("weights_sha256") != theirs.get("weights_sha256"):
            lines.append(
                f"{a.run(identity).label}: other weights (error {ours['test_error']:.2f} against "
                f"{theirs['test_error']:.2f})"
            )
        elif ours["test_error"] != theirs["test_error"]:
            lines.append(f"{a.run(identity).label}: the same weights, another error")
    counts = f"{len(shared)} runs in both, {len(a.results) - len(shared)} in the first alone, "
    return [f"{counts}{len(b.results) - len(shared)} in the second alone", *lines]


def _errors(a: Results, b: Results) -> list[str]:
    rows_a, rows_b = _rows(a), _rows(b)
    lines = []
    for place in rows_a | rows_b:
        said = []
        for results, rows in ((a, rows_a), (b, rows_b)):
            if place not in rows:
                said.append(_UNSET)
                continue
            summary = summarise(list(errors(results, rows[place]).values()))
            said.append(f"{words.plus_minus(summary)} (n = {summary.n})")
        if said[0] != said[1]:
            lines.append("{}: {} against {}".format(" ".join(place), *said))
    return lines


def _rows(results: Results) -> dict[tuple[str, ...], Row]:
    return {
        (arm.dataset, arm.backbone, arm.augmentation, arm.method): Row(
            arm, {seed: i for seed, i in arm.runs.items() if i in results.results}
        )
        for arm in results.plan.arms
    }
