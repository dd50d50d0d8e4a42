"""explain, compare, seeds and export, and the commands that call them."""

import csv
import io
import re

import pytest
from typer.testing import CliRunner

from benchmarks.cli import app
from benchmarks.errors import UserError
from benchmarks.report import write_report
from benchmarks.report.compare import compare
from benchmarks.report.export import escape, export
from benchmarks.report.provenance import Choice, explain, results_folder
from benchmarks.report.seeds import seeds
from tests.sweeps import Sweep, checkpoint, environment, full_sweep

SMALL = {
    "seeds": [0, 1, 2],
    "datasets": ["fashion_mnist"],
    "training": {"epochs": 6, "post_epochs": 2, "batch_size": 256},
}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    made = full_sweep(tmp_path_factory.mktemp("sweep"), SMALL)
    write_report(made.folder)
    return made


def test_explain_lists_the_runs_of_every_arm_with_a_variant(sweep):
    text = explain(sweep.folder / "errors.csv", Choice(dataset="fashion_mnist", method="pof"))
    heads = [line for line in text.splitlines() if line.startswith("fashion_mnist/")]
    assert [head.partition(":")[0] for head in heads] == [
        "fashion_mnist/wrn_28_10/basic/sgd+pof",
        "fashion_mnist/wrn_28_10/basic/sam+pof",
    ]
    run = sweep.final("sam+pof", 1)
    assert f"runs/{run.name}" in text
    assert f"starts from checkpoint {checkpoint(run.parent)} of {run.parent}" in text
    for said in (
        "code 0123456789abcdef0123456789abcdef01234567, clean",
        "device NVIDIA A100, 4 threads, bf16, Python 3.11.7",
        "torch 2.13.0",
        "Slurm SLURM_JOB_ID 4711",
        "data fashion_mnist sha256:fashion_mnist",
        "72 s of wall time",
        "measured hessian-classifier-train.json: largest eigenvalue",
        "optimizer.learning_rate = 0.1",
        "pof.gamma = 2.0",
    ):
        assert said in text


def test_explain_takes_a_cell_of_the_page_and_one_seed(sweep):
    html = (sweep.folder / "report.html").read_text()
    places = re.findall(r'title="python -m benchmarks explain results/made ([^"]*)"', html)
    assert "fashion_mnist/wrn_28_10/basic/sam" in places
    for place in set(places):
        assert explain(sweep.folder, Choice(cell=place)).startswith(place + ":")
    text = explain(sweep.folder, Choice(cell=places[0], seed=1))
    assert "seed 1: error" in text
    assert "seed 0:" not in text
    assert len(text) < len(explain(sweep.folder, Choice(cell=places[0])))


def test_explain_shows_restarts_warnings_dirt_and_what_is_missing(tmp_path):
    made = Sweep(tmp_path, SMALL | {"methods": ["sam+pof"]})
    for run in made.plan.runs:
        if run.settings.seed == 2:
            continue
        post = run.parent is not None
        where = environment(code={"revision": "ab12", "dirty": True})
        more = {"runaway": True, "capped_share": 0.25} if post else {}
        more |= {"at_once": {"seeds": [0, 1], "bits": "not promised: rounding"}}
        made.finish(run, 4.0, where=where, starts=3, warnings=["started over"], **more)
    text = explain(made.folder, Choice())
    for said in (
        "code ab12, with uncommitted changes",
        "trained at once with other seeds: bits not promised: rounding",
        "2 restarts",
        "warning: started over",
        "warning: post-training ran away",
        "warning: 25.0% of the ranges reached the cap",
        "seed 2: PENDING",
        "2 of 3 done",
    ):
        assert said in text


def test_explain_still_works_where_runs_may_not_be_pooled(tmp_path):
    made = Sweep(tmp_path, SMALL | {"methods": ["sam"]})
    for run in made.plan.runs:
        made.finish(run, 4.0, where=environment(device=f"device {run.settings.seed}"))
    text = explain(made.folder, Choice())
    assert text.count("\nseed ") == 3
    assert "device device 2" in text


def test_explain_refuses_what_is_not_there(sweep, tmp_path):
    with pytest.raises(UserError, match="no such row; there are: fashion_mnist/wrn_28_10/basic/s"):
        explain(sweep.folder, Choice(dataset="digits"))
    with pytest.raises(UserError, match="no such file or folder"):
        explain(tmp_path / "absent.csv", Choice())
    with pytest.raises(UserError, match="not in a results folder"):
        results_folder(tmp_path)
    assert results_folder(sweep.folder / "plots" / "differences.svg") == sweep.folder


def test_compare_names_settings_environments_runs_and_errors_that_differ(sweep, tmp_path):
    same = compare(str(sweep.folder), str(sweep.folder), tmp_path)
    assert same.count("no difference") == 3
    assert f"{len(sweep.plan.runs)} runs in both, 0 in the first alone" in same
    changes = {"seeds": [0, 1], "sam": {"rho": 0.1}, "methods": ["sgd", "sam"]}
    other = Sweep(tmp_path, SMALL | changes, name="other")
    for run in other.plan.runs:
        where = environment(device="NVIDIA H100")
        other.finish(run, 9.0, where=where, weights_sha256="other")
    text = compare(str(sweep.folder), str(other.folder), tmp_path)
    first, second = str(sweep.folder), str(other.folder)
    assert f"sam.rho: {first} 0.05, {second} 0.1" in text
    assert f"seeds: {first} [0, 1, 2], {second} [0, 1]" in text
    assert "device: NVIDIA A100 against NVIDIA H100" in text
    assert "4 runs in both" in text  # SGD's two stages of two seeds: ρ is not theirs
    assert text.count("other weights (error ") == 4
    assert re.search(
        r"basic sgd: 4\.\d\d ± 0\.\d\d \(n = 3\) against 9\.00 ± 0\.00 \(n = 2\)", text
    )
    assert re.search(r"basic sam\+pof: .* against –", text)


def test_compare_takes_profiles_that_have_no_results(tmp_path):
    text = compare("smoke", "paper", tmp_path)
    assert "backbones: smoke ['wrn_10_1'], paper ['wrn_28_10']" in text
    assert "results: none of smoke and paper" in text
    with pytest.raises(UserError, match=r"it has no plan\.json"):
        compare(str(tmp_path), "paper", tmp_path)


def test_seeds_answers_for_the_effect_found_and_for_one_asked_about(sweep):
    found, asked = seeds(sweep.folder, claim="sgd"), seeds(sweep.folder, claim="sgd", effect=0.9)
    (row,) = [line for line in found.splitlines() if line.startswith("| sgd")]
    (other,) = [line for line in asked.splitlines() if line.startswith("| sgd")]
    assert "REPRODUCED" in row
    assert "3/3" in row
    assert " 0.90 " in other
    assert int(other.split("|")[-2]) > int(row.split("|")[-2])
    with pytest.raises(UserError, match="no claim 'nonsense'; there are: error"):
        seeds(sweep.folder, claim="nonsense")


def test_export_writes_tables_for_a_paper_and_one_tidy_csv(sweep, tmp_path):
    paths = export(sweep.folder, tmp_path / "out")
    names = {path.name for path in paths}
    assert names >= {"runs.csv", "errors.tex", "errors.md", "hessian.tex", "verdicts.md"}
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "runs.csv").read_text())))
    assert len(rows) == len(sweep.plan.runs)
    run = sweep.final("sam+pof", 2)
    (row,) = [row for row in rows if row["identity"] == run.identity]
    assert (row["method"], row["seed"], row["parent"]) == ("sam+pof", "2", run.parent)
    assert float(row["top_eigenvalue_train"]) > 0
    table = (tmp_path / "out" / "errors.tex").read_text()
    assert r"Throughout: dataset fashion\_mnist, backbone wrn\_28\_10" in table
    body = [line for line in table.splitlines() if line.endswith(r"\\")]
    columns = re.search(r"\\begin\{tabular\}\{([lr]+)\}", table)[1]
    assert {line.count("&") for line in body} == {len(columns) - 1}
    assert len(body) == 1 + 4
    assert r"$\pm$" in table
    for path in paths:
        if path.suffix == ".tex":
            path.read_text().encode("ascii")  # nothing that LaTeX would need a package for


def test_latex_special_characters_are_escaped():
    assert escape("50% & a_b < ρ − {x}") == r"50\% \& a\_b $<$ $\rho$ $-$ \{x\}"


def test_the_commands(sweep, tmp_path):
    results = ["--profile", "made", "--results-dir", str(sweep.folder.parent)]
    place = "fashion_mnist/wrn_28_10/basic/sam"
    for arguments, said in (
        (["report", *results, "--split-by", "device"], "NVIDIA A100"),
        (["explain", str(sweep.folder), place], "3 of 3 done"),
        (["explain", str(sweep.folder / "errors.csv"), "--method", "pof"], "basic/sgd+pof"),
        (["compare", str(sweep.folder), "paper"], "results: none of paper"),
        (["seeds", *results, "--claim", "sgd"], "seeds needed"),
        (["export", *results, "--out", str(tmp_path / "out")], "runs.csv"),
    ):
        done = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        assert said in done.output
    assert "made" in (sweep.folder.parent / "README.md").read_text()
