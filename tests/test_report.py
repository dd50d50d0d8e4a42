"""From records to tables: the statistics, what is missing, what is published, what was edited."""

import csv
import io
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks import plan as planning
from benchmarks.errors import UserError
from benchmarks.report import write_report
from benchmarks.report.statistics import paired_difference, summarise
from benchmarks.store import Store
from tests.harness import files_of, finish, make_plan


class Published:
    """A made-up ``results/tiny``."""

    def __init__(self, folder: Path, changes=None, **more) -> None:
        self.plan = make_plan(folder, changes, **more)
        self.folder = folder / "results" / "tiny"
        self.store = Store(self.folder / "runs")
        self.plan.write(self.folder / planning.FILE)

    def final(self, method, seed, **cell):
        """The run whose test error stands in the table."""
        (arm,) = [
            arm
            for arm in self.plan.arms
            if arm.method == method and all(getattr(arm, k) == v for k, v in cell.items())
        ]
        return self.plan.by_identity()[arm.runs[seed]]

    def finish(self, errors, **more):
        """Finish final runs (method → errors in the order of seeds, ``None``: missing)."""
        seeds = self.plan.profile.seeds
        for run in self.plan.runs:
            if run.parent is None:
                finish(self.store, run, 50.0)
        for method, values in errors.items():
            for seed, value in zip(seeds, values, strict=True):
                if value is not None:
                    finish(self.store, self.final(method, seed), value, **more)

    def read(self):
        """The page, and the rows of errors.csv."""
        write_report(self.folder)
        text = (self.folder / "errors.csv").read_text()
        return (self.folder / "README.md").read_text(), list(csv.DictReader(io.StringIO(text)))


def test_mean_interval_and_deviation_are_those_of_scipy():
    values = [2.71, 3.14, 1.41, 1.73, 2.24]
    found = summarise(values)
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert found.n == 5
    assert found.mean == pytest.approx(statistics.mean(values), rel=1e-14)
    assert found.sd == pytest.approx(statistics.stdev(values), rel=1e-14)
    assert found.mean - found.ci95 == pytest.approx(low, rel=1e-12)
    assert found.mean + found.ci95 == pytest.approx(high, rel=1e-12)
    # By hand: two values 1 apart, t(0.975; 1) = 12.7062, sd = 1/√2.
    assert summarise([1.0, 2.0]).ci95 == pytest.approx(12.7062 / 2, abs=1e-4)


def test_what_too_few_seeds_do_not_tell_is_not_a_number():
    assert summarise([]).n == 0
    assert math.isnan(summarise([]).mean)
    one = summarise([3.0])
    assert (one.n, one.mean) == (1, 3.0)
    assert math.isnan(one.ci95)
    assert math.isnan(one.sd)


def test_the_paired_difference_is_the_paired_t_tests_over_common_seeds():
    treated = {4: 2.5, 1: 2.0, 2: 2.7, 3: 3.1, 8: 99.0}
    base = {1: 2.4, 2: 2.6, 3: 3.6, 4: 2.9, 9: -99.0}
    found = paired_difference(treated, base)
    common = [1, 2, 3, 4]
    test = stats.ttest_rel([treated[s] for s in common], [base[s] for s in common])
    interval = test.confidence_interval(0.95)
    assert found.n == 4
    assert found.mean - found.ci95 == pytest.approx(interval.low, rel=1e-12)
    assert found.mean + found.ci95 == pytest.approx(interval.high, rel=1e-12)


SEEDS = {"seeds": [0, 1, 2]}
ERRORS = {
    "sgd": [5.0, 6.0, 7.5],
    "sam": [4.0, 5.5, 6.0],
    "sam+pof": [3.5, 5.25, 6.25],
}


def test_the_csv_is_what_the_records_give(tmp_path):
    results = Published(tmp_path, SEEDS)
    results.finish(ERRORS)
    _, rows = results.read()
    assert [row["method"] for row in rows] == ["sgd", "sam", "sam+pof"]
    for row in rows:
        recorded = []
        for seed in (0, 1, 2):
            name = results.final(row["method"], seed).name
            path = results.store.root / name / "result.json"
            recorded.append(json.loads(path.read_text())["test_error"])
            assert float(row[f"seed_{seed}"]) == pytest.approx(recorded[-1], abs=1e-6)
        assert (row["dataset"], row["backbone"], row["augmentation"]) == (
            "digits",
            "wrn_10_1",
            "none",
        )
        assert (row["n"], row["n_expected"]) == ("3", "3")
        assert float(row["mean"]) == pytest.approx(np.mean(recorded), abs=1e-6)
        assert float(row["sd"]) == pytest.approx(np.std(recorded, ddof=1), abs=1e-6)
        half = stats.t.ppf(0.975, 2) * stats.sem(recorded)
        assert float(row["ci95"]) == pytest.approx(half, abs=1e-6)


def test_the_page_shows_rows_differences_and_what_plus_minus_means(tmp_path):
    results = Published(tmp_path, SEEDS)
    results.finish(ERRORS)
    page, _ = results.read()
    half = stats.t.ppf(0.975, 2) * stats.sem(ERRORS["sam"])
    sam = next(line for line in page.splitlines() if "| SAM  " in line)
    assert f"{np.mean(ERRORS['sam']):.2f} ± {half:.2f}" in sam
    assert "3/3" in sam
    test = stats.ttest_rel(ERRORS["sam+pof"], ERRORS["sam"]).confidence_interval(0.95)
    middle, half = (test.low + test.high) / 2, (test.high - test.low) / 2
    (difference,) = [line for line in page.splitlines() if "SAM+PoF − SAM" in line]
    assert f"−{abs(middle):.2f} ± {half:.2f}" in difference
    assert middle < 0
    assert "95% t-interval over seeds" in page
    assert "Missing" not in page
    assert "published" not in page


def test_a_missing_seed_changes_n_and_interval_and_is_named(tmp_path):
    results = Published(tmp_path, SEEDS)
    results.finish(ERRORS | {"sam+pof": [3.5, None, 6.25]})
    page, rows = results.read()
    row = rows[2]
    assert (row["n"], row["n_expected"], row["seed_1"]) == ("2", "3", "")
    assert float(row["mean"]) == pytest.approx(4.875)
    half = stats.t.ppf(0.975, 1) * stats.sem([3.5, 6.25])
    assert float(row["ci95"]) == pytest.approx(half, abs=1e-6)
    run = results.final("sam+pof", 1)
    assert f"- PENDING: {run.label}" in page
    assert page.count("- PENDING") == 1
    # The difference is over the seeds that both arms have.
    difference = summarise([3.5 - 4.0, 6.25 - 6.0])
    assert f"± {difference.ci95:.2f}" in next(x for x in page.splitlines() if "PoF − SAM" in x)


def test_failed_and_blocked_runs_are_named_with_their_reason(tmp_path):
    results = Published(tmp_path)
    results.finish({"sgd": [5.0]})
    parent = results.plan.by_identity()[results.final("sam", 0).parent]
    folder = results.store.folder(parent)
    (folder.path / "result.json").unlink()
    folder.write_failure("the loss is not finite at epoch 1, step 2", "trace")
    page, rows = results.read()
    assert f"- FAILED: {parent.label}: the loss is not finite at epoch 1, step 2" in page
    assert f"- BLOCKED: {results.final('sam', 0).label}" in page
    assert f"- BLOCKED: {results.final('sam+pof', 0).label}" in page
    assert [row["n"] for row in rows] == ["1", "0", "0"]
    assert [row["mean"] for row in rows] == ["5.000000", "", ""]


def test_a_data_set_that_could_not_be_had_is_named_with_the_reason(tmp_path):
    results = Published(
        tmp_path, {"datasets": ["digits", "cifar10"]}, unavailable={"cifar10": "no mirror answers"}
    )
    results.finish({})
    page, rows = results.read()
    assert "- UNAVAILABLE: cifar10: no mirror answers" in page
    assert [row["n"] for row in rows if row["dataset"] == "cifar10"] == ["0"] * 3


def test_runaways_capped_batches_and_warnings_are_shown_with_their_run(tmp_path):
    results = Published(tmp_path)
    results.finish({"sam": [5.0]})
    finish(
        results.store,
        results.final("sam+pof", 0),
        5.0,
        runaway=True,
        capped_share=0.25,
        warnings=["no usable checkpoint: started over"],
    )
    page, _ = results.read()
    lines = [x for x in page.splitlines() if x.startswith(f"- {results.final('sam+pof', 0).label}")]
    assert len(lines) == 3
    assert "ran away" in lines[0]
    assert "25.0%" in lines[1]
    assert "started over" in lines[2]


FULL = {
    "datasets": ["cifar10", "svhn"],
    "backbones": ["wrn_28_10", "wrn_10_1"],
    "augmentations": ["basic"],
    "methods": ["sgd", "sam", "sam+pof"],
    "data": None,
    "training": {"epochs": 200, "post_epochs": 50, "batch_size": 256},
}


def published_cells(page):
    """Rows of the error table that show a published number: first words → the number."""
    table = [
        [c.strip() for c in line.split("|")[1:-1]] for line in page.splitlines() if "|" in line
    ]
    header = next((row for row in table if "published [%]" in row), None)
    if header is None:
        return {}
    column = header.index("published [%]")
    body = table[table.index(header) + 2 :]
    rows = [row for row in body if len(row) == len(header) and "±" in row[column]]
    return {tuple(row[:4]): row[column].partition(" (")[0] for row in rows}


def test_a_published_number_stands_beside_the_row_with_its_setting_alone(tmp_path):
    page, _ = Published(tmp_path, FULL).read()
    assert published_cells(page) == {
        ("cifar10", "wrn_28_10", "basic", "SGD"): "3.5 ± 0.1",
        ("cifar10", "wrn_28_10", "basic", "SAM"): "2.7 ± 0.1",
        ("svhn", "wrn_28_10", "basic", "SGD"): "1.58 ± 0.03",
        ("svhn", "wrn_28_10", "basic", "SAM"): "1.42 ± 0.02",
    }
    assert "Foret et al., ICLR 2021" in page


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"train_size": 50_000}},
        {"data": {"train_size": None, "holdout": 5000}},
        {"training": {"epochs": 20, "post_epochs": 5, "batch_size": 256}},
        {"training": {"epochs": 200, "post_epochs": 50, "batch_size": 128}},
    ],
)
def test_no_published_number_beside_another_setting(tmp_path, changes):
    changes = {"data": {"train_size": None}} | changes
    page, _ = Published(tmp_path, FULL | changes).read()
    assert published_cells(page) == {}


def test_the_same_records_give_the_same_bytes_and_touch_no_file(tmp_path):
    results = Published(tmp_path, SEEDS)
    results.finish(ERRORS)
    results.read()
    content = files_of(results.folder)
    times = {p: p.stat().st_mtime_ns for p in results.folder.rglob("*")}
    results.read()
    assert {p: p.stat().st_mtime_ns for p in results.folder.rglob("*")} == times
    for name in ("errors.csv", "README.md"):
        (results.folder / name).unlink()
    results.read()
    assert files_of(results.folder) == content


@pytest.mark.parametrize(
    ("file", "edit", "said"),
    [
        ("result.json", lambda x: x.replace('"test_error": 4.0', '"test_error": 0.4'), "digest"),
        ("result.json", lambda x: x[: len(x) // 2], "cannot be read as JSON"),
        ("metrics.jsonl", lambda x: x.replace("4.0", "0.4"), "does not fit the result"),
        ("config.json", lambda x: x.replace('"seed": 0', '"seed": 1'), "edited"),
        ("config.json", lambda x: x.replace('"schema": 1', '"schema": 0'), "schema version 0"),
        ("environment.json", lambda _: "{}", "environments"),
    ],
)
def test_an_edited_record_is_one_line_that_names_the_file(tmp_path, file, edit, said):
    results = Published(tmp_path)
    results.finish({"sam": [4.0]})
    path = results.store.folder(results.final("sam", 0)).path / file
    before = path.read_text()
    path.write_text(edit(before))
    assert path.read_text() != before
    with pytest.raises(UserError) as caught:
        results.read()
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_record_in_another_runs_folder_is_refused(tmp_path):
    results = Published(tmp_path, {"seeds": [0, 1]})
    results.finish({"sam": [4.0, 9.0]})
    good, bad = (results.store.folder(results.final("sam", seed)).path for seed in (0, 1))
    for path in bad.iterdir():
        path.write_bytes((good / path.name).read_bytes())
    with pytest.raises(UserError, match="holds another run than its name says"):
        results.read()


def test_no_results_at_all_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no results here yet"):
        write_report(tmp_path / "absent")
