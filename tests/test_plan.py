"""Expansion into runs: identity, shared stages, pairing by seed, lineage."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import plan as planning
from benchmarks.errors import UserError
from benchmarks.settings import PROFILES, load_profile
from tests.harness import ROOT, make_plan

# The identity of the first run of the plan below. It may change only together with
# benchmarks.run.SCHEMA, or when a setting is added: every earlier result then ceases to count.
GOLDEN = "f7dc16b373adbb75295cf0bf83d810027e843664c0094ba8790eea443daff5ef"


def identities(plan):
    return {run.label: run.identity for run in plan.runs}


def test_arms_of_one_base_share_its_first_stage_and_are_paired_by_seed(tmp_path):
    plan = make_plan(tmp_path, {"seeds": [3, 5]})
    by_identity = plan.by_identity()
    assert len(by_identity) == len(plan.runs) == 2 * (2 + 2 + 1)  # sgd ×2, sam ×2, PoF; a seed
    stages = [(r.settings.algorithm, r.settings.first_epoch, r.settings.seed) for r in plan.runs]
    assert stages.count(("sam", 0, 3)) == 1
    arms = {arm.method: arm for arm in plan.arms}
    for seed in (3, 5):
        sam = by_identity[arms["sam"].runs[seed]]
        pof = by_identity[arms["sam+pof"].runs[seed]]
        assert sam.parent == pof.parent
        parent = by_identity[sam.parent]
        assert parent.parent is None
        assert (parent.settings.algorithm, parent.settings.seed) == ("sam", seed)
        assert (parent.settings.first_epoch, parent.settings.last_epoch) == (0, 2)
        assert (sam.settings.first_epoch, sam.settings.last_epoch) == (2, 3)
        assert pof.settings.algorithm == "pof"
        assert (pof.settings.first_epoch, pof.settings.last_epoch) == (2, 3)


def test_parents_come_before_their_children(tmp_path):
    plan = make_plan(tmp_path, {"methods": ["sam+pof", "sgd+pof", "sam", "sgd"], "seeds": [0, 1]})
    seen = set()
    for run in plan.runs:
        assert run.parent is None or run.parent in seen
        seen.add(run.identity)


def test_identity_is_the_same_in_every_process(tmp_path):
    plan = make_plan(tmp_path)
    assert plan.runs[0].identity == GOLDEN
    program = (
        "import sys; from pathlib import Path; from tests.harness import make_plan;"
        "print([r.identity for r in make_plan(Path(sys.argv[1])).runs])"
    )
    for salt in ("1", "2"):
        printed = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": salt},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert printed.strip() == str([run.identity for run in plan.runs])


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"train_size": 149}},
        {"data": {"train_size": 150, "subset_seed": 1}},
        {"data": {"train_size": 150, "holdout": 9}},
        {"network": {"classifier_init": "authors"}},
        {"training": {"epochs": 2, "post_epochs": 1, "batch_size": 30}},
        {"training": {"epochs": 2, "post_epochs": 1, "batch_size": 25, "precision": "bf16"}},
        {"training": {"epochs": 2, "post_epochs": 1, "batch_size": 25, "channels_last": False}},
        {"augmentations": ["basic"]},
        {"augmentation": {"flip": False}},
        {"optimizer": {"learning_rate": 0.2}},
        {"optimizer": {"label_smoothing": 0.1}},
        {"schedule": {"milestones": [1]}},
        {"backbones": ["wrn_16_1"]},
        {"seeds": [7]},
    ],
)
def test_what_can_change_the_numbers_of_a_run_changes_every_identity(tmp_path, changes):
    before = {run.identity for run in make_plan(tmp_path).runs}
    after = {run.identity for run in make_plan(tmp_path, changes).runs}
    assert len(after) == len(before)
    assert not before & after


def test_settings_of_one_method_change_its_runs_and_their_children_alone(tmp_path):
    before = identities(make_plan(tmp_path))
    sam = identities(make_plan(tmp_path, {"sam": {"rho": 0.1}}))
    pof = identities(make_plan(tmp_path, {"pof": {"cap": 3.0}}))
    assert {label for label in before if before[label] != sam[label]} == {
        label for label in before if " sam" in label
    }
    assert {label for label in before if before[label] != pof[label]} == {
        label for label in before if "+pof" in label
    }


def test_what_is_only_recorded_or_described_changes_no_identity(tmp_path):
    before = identities(make_plan(tmp_path))
    changes = {"title": "Else", "description": "x", "training": {"evaluate_every": 2}}
    assert identities(make_plan(tmp_path, changes)) == before


def test_another_content_of_the_data_set_makes_other_runs(tmp_path):
    plan = make_plan(tmp_path)
    other = planning.expand(plan.profile, {"digits": "sha256:else"}, {})
    assert not plan.by_identity().keys() & other.by_identity().keys()


def test_profiles_that_ask_for_the_same_run_share_its_folder(tmp_path):
    small = make_plan(tmp_path, {"methods": ["sam"]})
    large = make_plan(tmp_path, {"seeds": [0, 1], "variants": {"x": {"gamma": 3.0}}})
    assert {run.name for run in small.runs} <= {run.name for run in large.runs}


def test_no_second_stage_without_epochs_for_it(tmp_path):
    plan = make_plan(tmp_path, {"methods": ["sam"], "training": {"post_epochs": 0}})
    assert [(r.settings.first_epoch, r.settings.last_epoch) for r in plan.runs] == [(0, 2)]
    assert plan.arms[0].runs == {0: plan.runs[0].identity}


def test_a_base_method_continues_on_terms_of_its_own_from_the_shared_first_stage(tmp_path):
    terms = {"slow": {"learning_rate": 0.01}, "long": {"epochs": 4}, "same": {}}
    methods = ["sam", *(f"sam+{name}" for name in terms)]
    plan = make_plan(tmp_path, {"methods": methods, "continued": terms})
    runs = plan.by_identity()
    usual, slow, long, same = (runs[arm.runs[0]] for arm in plan.arms)
    assert same == usual  # one training, two rows
    assert {r.parent for r in (usual, slow, long)} == {plan.runs[0].identity}
    assert {r.settings.algorithm for r in plan.runs} == {"sam"}
    assert slow.settings.optimizer.learning_rate == 0.01
    assert slow.settings.schedule.kind == "constant"
    assert slow.settings.last_epoch == usual.settings.last_epoch == 3
    assert (long.settings.first_epoch, long.settings.last_epoch) == (2, 6)
    assert long.settings.optimizer == usual.settings.optimizer
    assert long.settings.schedule == usual.settings.schedule


def test_post_training_may_end_early_and_is_what_it_was_until_then(tmp_path):
    changes = {
        "methods": ["sam+pof", "sam+early"],
        "training": {"post_epochs": 5},
        "variants": {"early": {"epochs": 2}},
    }
    plan = make_plan(tmp_path, changes)
    whole, early = (plan.by_identity()[arm.runs[0]] for arm in plan.arms)
    assert whole.parent == early.parent
    assert (early.settings.first_epoch, early.settings.last_epoch) == (2, 4)
    assert early.settings.model_copy(update={"last_epoch": 7}) == whole.settings


def test_the_gpus_profiles_stop_post_training_early_too():
    for name in ("gpu-fashion", "gpu-map"):
        profile = load_profile(name)
        plan = planning.expand(profile, {"fashion_mnist": "sha256:made-up"}, {})
        ends = {run.settings.last_epoch for run in plan.runs if run.method == "sam+pof-10-epochs"}
        assert ends == {210}
        assert any(r.method == "sam+pof" and r.settings.last_epoch == 250 for r in plan.runs)


def test_a_data_set_that_cannot_be_had_leaves_its_rows_empty(tmp_path):
    plan = make_plan(tmp_path, {"datasets": ["svhn", "digits"]}, unavailable={"svhn": "no network"})
    assert {run.settings.dataset for run in plan.runs} == {"digits"}
    assert [bool(arm.runs) for arm in plan.arms] == [False] * 3 + [True] * 3
    assert plan.unavailable == {"svhn": "no network"}


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.toml")), ids=lambda p: p.stem)
def test_every_profile_of_the_project_expands_and_survives_the_disk(tmp_path, path):
    profile = load_profile(path.stem)
    plan = planning.expand(profile, {name: f"sha256:{name}" for name in profile.datasets}, {})
    assert len(plan.arms) == len(profile.cells()) * len(profile.methods)
    assert len({run.name for run in plan.runs}) == len(plan.runs)
    plan.write(tmp_path / "plan.json")
    assert planning.read(tmp_path / "plan.json") == plan


def test_a_plan_of_another_version_or_none_at_all_is_one_line(tmp_path):
    path = tmp_path / "plan.json"
    make_plan(tmp_path).write(path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"schema_version": 99}))
    with pytest.raises(UserError, match=r"plan\.json: schema version 99, this code reads 1"):
        planning.read(path)
    path.write_text(json.dumps(content | {"arms": 3}))
    with pytest.raises(UserError, match=r"plan\.json: arms: "):
        planning.read(path)
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        planning.read(path)
