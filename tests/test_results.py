"""Records that are broken, doubled, misplaced or of another version: a clear line each."""

import json
import shutil

import pytest

from benchmarks import plan as planning
from benchmarks.errors import UserError
from benchmarks.files import canonical_json, sha256
from benchmarks.report import write_report
from benchmarks.report.measurements import Hessian, Ranges
from benchmarks.report.results import read
from tests.sweeps import Sweep

SMALL = {
    "seeds": [0, 1],
    "datasets": ["cifar10"],
    "methods": ["sam", "sam+pof"],
    "training": {"epochs": 2, "post_epochs": 1, "batch_size": 256},
}


@pytest.fixture
def sweep(tmp_path):
    made = Sweep(tmp_path, SMALL)
    made.finish_all(lambda run: 2.5)
    return made


def refused(sweep):
    with pytest.raises(UserError) as caught:
        write_report(sweep.folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(path, change):
    """Edit a JSON file by hand."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def sign(content):
    """Make a measurement's digest fit again."""
    content.pop("digest")
    content["digest"] = sha256(canonical_json(content))


def test_a_duplicate_run_folder_is_named_with_the_run_it_repeats(sweep):
    path = sweep.store.folder(sweep.final("sam", 0)).path
    shutil.copytree(path, path.with_name("again"))
    said = refused(sweep)
    assert said.startswith(f"{path.with_name('again')}: duplicate run: the same as {path.name}")


def test_a_run_of_another_plan_is_named(sweep, tmp_path):
    other = Sweep(tmp_path / "other", SMALL | {"seeds": [7]})
    other.finish_all(lambda run: 1.0)
    run = other.final("sam", 7)
    shutil.copytree(other.store.folder(run).path, sweep.store.root / run.name)
    assert "no run of this plan" in refused(sweep)


def test_a_run_listed_twice_in_the_plan_is_named(sweep):
    edit(sweep.folder / planning.FILE, lambda plan: plan["runs"].append(plan["runs"][0]))
    assert f"duplicate run: {sweep.plan.runs[0].name} is listed twice" in refused(sweep)


def test_a_run_under_another_seed_is_named(sweep):
    def swap(plan):
        runs = plan["arms"][0]["runs"]
        runs["0"], runs["1"] = runs["1"], runs["0"]

    edit(sweep.folder / planning.FILE, swap)
    assert "the run of seed 0 has another seed" in refused(sweep)


def test_an_arm_whose_run_is_not_in_the_plan_is_named(sweep):
    edit(sweep.folder / planning.FILE, lambda plan: plan["arms"][0]["runs"].update({"0": "abc"}))
    assert "seed 0: no such run in the plan: abc" in refused(sweep)


def test_an_older_schema_is_named_with_its_version(sweep):
    edit(sweep.folder / planning.FILE, lambda plan: plan.update(schema_version=0))
    assert "schema version 0, this code reads 1; run the profile again" in refused(sweep)


def test_an_older_result_is_named_with_its_version(sweep):
    def age(result):
        result["schema"] = 0
        sign(result)

    edit(sweep.store.folder(sweep.final("sam", 0)).path / "result.json", age)
    assert "result.json: schema version 0, this code reads 1" in refused(sweep)


def test_measurements_are_read_and_typed(sweep):
    run = sweep.final("sam", 0)
    sweep.measure_hessian(run, 2.0)
    sweep.measure_ranges(run, "test", 1.0)
    sweep.measure(run, "density", nodes=[1.0], weights=[1.0])
    density, hessian, ranges = read(sweep.folder).measurements[run.identity]
    assert isinstance(hessian, Hessian)
    assert (hessian.block, hessian.top_eigenvalue, hessian.trace) == ("classifier", 2.0, 6.0)
    assert isinstance(ranges, Ranges)
    assert ranges.peak == pytest.approx(1.0, rel=0.15)
    assert (density.kind, density.content["nodes"]) == ("density", [1.0])


def test_the_top_eigenvalue_is_the_largest_and_none_if_it_has_not_converged(sweep):
    run, other = sweep.final("sam", 0), sweep.final("sam", 1)
    more = {"residuals": [0.0] * 3, "converged": [False, True, True]}
    sweep.measure_hessian(run, 1.0, eigenvalues=[1.0, 3.0, 2.0], **more)
    sweep.measure_hessian(other, 1.0, eigenvalues=[5.0, 3.0, 2.0], **more)
    found = read(sweep.folder).measurements
    assert found[run.identity][0].top_eigenvalue == 3.0
    assert found[other.identity][0].top_eigenvalue is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m["eigenvalues"].__setitem__(0, 0.1), "its digest does not fit"),
        (lambda m: (m.update(schema=0), sign(m)), "schema version 0, this code reads 1"),
        (lambda m: (m.pop("split"), sign(m)), "lacks split"),
        (lambda m: (m.pop("converged"), sign(m)), "lacks converged"),
        (lambda m: (m.update(checkpoint_sha256="0"), sign(m)), "measured on another network"),
    ],
)
def test_a_broken_measurement_is_one_line_that_names_the_file(sweep, change, said):
    path = sweep.measure_hessian(sweep.final("sam", 0), 2.0)
    edit(path, change)
    found = refused(sweep)
    assert found.startswith(f"{path}: ")
    assert said in found
