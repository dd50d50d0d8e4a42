"""What may share a row: environments, data copies and settings, refused or split."""

import json

import pytest

from benchmarks import plan as planning
from benchmarks.errors import UserError
from benchmarks.files import write_json
from benchmarks.report import write_report
from benchmarks.report.guards import FIELDS, weigh
from benchmarks.report.results import read
from tests.sweeps import Sweep, environment

SMALL = {
    "seeds": [0, 1, 2],
    "datasets": ["cifar10"],
    "methods": ["sam", "sam+pof"],
    "training": {"epochs": 2, "post_epochs": 1, "batch_size": 256},
}


def mixed(folder, where=None, *, seed=2, only=None, changes=None):
    """A sweep in which the runs of one seed were made elsewhere."""
    sweep = Sweep(folder, SMALL | (changes or {}))
    for run in sweep.plan.runs:
        elsewhere = run.settings.seed == seed and only in (None, run.method)
        error = 2.5 + 0.1 * run.settings.seed - (run.method == "sam+pof") * 0.2
        sweep.finish(run, error, where=where if elsewhere else None)
    return sweep


@pytest.mark.parametrize(
    ("field", "where", "said"),
    [
        ("device", environment(device="NVIDIA H100"), "device: NVIDIA A100 and NVIDIA H100"),
        ("torch", environment(packages={"torch": "2.14.0"}), "torch: 2.13.0 and 2.14.0"),
        ("timm", environment(packages={"timm": "1.1"}), "timm: 1.0.31 and 1.1"),
        ("precision", environment(precision="fp32"), "precision: bf16 and fp32"),
    ],
)
def test_another_environment_is_refused_with_its_reason_and_split_on_request(
    tmp_path, field, where, said
):
    sweep = mixed(tmp_path, where)
    results = read(sweep.folder)
    with pytest.raises(UserError) as caught:
        weigh(results)
    assert "not pooled, they differ in " + said in str(caught.value)
    assert "seed 0" in str(caught.value)
    assert "seed 2" in str(caught.value)
    assert f"--split-by {field}" in str(caught.value)
    assert "\n" not in str(caught.value)
    rows = weigh(results, [field]).rows
    assert [(row.arm.method, sorted(row.runs)) for row in rows] == [
        ("sam", [0, 1]),
        ("sam", [2]),
        ("sam+pof", [0, 1]),
        ("sam+pof", [2]),
    ]


def test_what_cannot_move_a_number_is_pooled(tmp_path):
    where = environment(cores=8, slurm={}, platform="Linux aarch64", threads=16)
    assert where["device"] != where["cpu"]
    rows = weigh(read(mixed(tmp_path, where).folder)).rows
    assert [len(row.runs) for row in rows] == [3, 3]


def test_threads_matter_on_a_cpu_alone(tmp_path):
    changes = {"seeds": [0, 1]}
    sweep = Sweep(tmp_path, SMALL | changes)
    for run in sweep.plan.runs:
        where = environment(device="a processor", threads=1 + run.settings.seed)
        sweep.finish(run, 2.5, where=where)
    with pytest.raises(UserError, match="differ in threads: 1 and 2"):
        weigh(read(sweep.folder))


def test_arms_made_on_different_devices_are_not_compared(tmp_path):
    """Each arm is uniform; their difference would not be."""
    sweep = Sweep(tmp_path, SMALL | {"methods": ["sgd", "sam"]})
    for run in sweep.plan.runs:
        device = "NVIDIA H100" if run.method == "sam" else "NVIDIA A100"
        sweep.finish(run, 2.5, where=environment(device=device))
    with pytest.raises(UserError, match="differ in device"):
        weigh(read(sweep.folder))


def test_a_parent_made_elsewhere_counts(tmp_path):
    """The stage that is compared was made on one device; what it starts from was not."""
    sweep = Sweep(tmp_path, SMALL)
    for run in sweep.plan.runs:
        moved = run.parent is None and run.settings.seed == 1
        sweep.finish(run, 2.5, where=environment(device="NVIDIA H100") if moved else None)
    with pytest.raises(UserError, match="differ in device: NVIDIA A100 and NVIDIA H100 then NVI"):
        weigh(read(sweep.folder))


def replan(sweep, edit):
    """Write the plan of a sweep with one run changed by hand, its identity made to fit."""
    content = sweep.plan.model_dump(mode="json")
    before = [run.identity for run in sweep.plan.runs]
    edit(content)
    plan = planning.Plan.model_validate_json(json.dumps(content))
    after = dict(zip(before, (run.identity for run in plan.runs), strict=True))
    text = json.dumps(content)
    for old, new in after.items():
        text = text.replace(old, new)
    write_json(sweep.folder / planning.FILE, json.loads(text))
    sweep.plan = planning.read(sweep.folder / planning.FILE)


@pytest.mark.parametrize(
    ("edit", "said", "field"),
    [
        (lambda s: s.update(fingerprint="sha256:a copy"), "data fingerprint", "data"),
        (lambda s: s["sam"].update(m_sharpness=32), "SAM ascent batch: 256 and 32", "ascent-batch"),
    ],
)
def test_a_data_copy_or_another_ascent_batch_is_refused_or_split(tmp_path, edit, said, field):
    sweep = Sweep(tmp_path, SMALL | {"methods": ["sam"], "training": {**SHORT, "post_epochs": 0}})

    def of_seed_2(content):
        for run in content["runs"]:
            if run["settings"]["seed"] == 2:
                edit(run["settings"])

    replan(sweep, of_seed_2)
    sweep.finish_all(lambda run: 2.5)
    with pytest.raises(UserError, match=said):
        write_report(sweep.folder)
    write_report(sweep.folder, split_by=[field])
    page = (sweep.folder / "README.md").read_text()
    rows = [line for line in page.splitlines() if "| SAM " in line and "2.50" in line]
    assert len(rows) == 2
    assert "2/3" in rows[0] + rows[1]
    assert "1/3" in rows[0] + rows[1]


SHORT = SMALL["training"]


def test_other_settings_of_one_arm_are_refused(tmp_path):
    sweep = Sweep(tmp_path, SMALL | {"methods": ["sam"], "training": {**SHORT, "post_epochs": 0}})

    def edit(content):
        content["runs"][1]["settings"]["optimizer"]["learning_rate"] = 0.2

    replan(sweep, edit)
    sweep.finish_all(lambda run: 2.5)
    with pytest.raises(UserError, match="not averaged, their settings differ in optimizer"):
        weigh(read(sweep.folder))


def test_an_unknown_field_is_one_line(tmp_path):
    with pytest.raises(UserError, match="--split-by colour: unknown; there are: device, torch"):
        weigh(read(mixed(tmp_path).folder), ["colour"])
    assert FIELDS == ("device", "torch", "timm", "precision", "threads", "data", "ascent-batch")
