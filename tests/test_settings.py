"""Profiles: strictly checked, every mistake one line with file, key and what is allowed."""

import pytest

from benchmarks.errors import UserError
from benchmarks.settings import PROFILES, load_profile
from tests.harness import profile_file


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.toml")), ids=lambda p: p.stem)
def test_every_profile_of_the_project_loads_with_all_its_cells(path):
    profile = load_profile(path.stem)
    for dataset, backbone, augmentation in profile.cells():
        assert profile.cell(dataset, backbone, augmentation).augmentation.kind == augmentation


def refusal(tmp_path, changes):
    path = profile_file(tmp_path, changes)
    with pytest.raises(UserError) as caught:
        load_profile(str(path))
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sed": [1]}, ["sed: unknown key", "'seeds'"]),
        ({"title": None}, ["title: missing"]),
        ({"training": {"epochz": 3}}, ["training.epochz", "'epochs'", "batch_size"]),
        ({"pof": {"gama": 2.0}}, ["pof.gama", "'gamma'", "cap_unit"]),
        ({"optimizer": {"lr": 0.1}}, ["optimizer.lr", "learning_rate"]),
        ({"training": {"epochs": "3"}}, ["training.epochs", "integer", "'3'"]),
        ({"training": {"epochs": 2.0}}, ["training.epochs", "integer"]),
        ({"training": {"channels_last": 1}}, ["training.channels_last", "boolean"]),
        ({"training": {"epochs": 0}}, ["training.epochs", "greater than 0"]),
        ({"seeds": []}, ["seeds", "at least 1"]),
        ({"seeds": [True]}, ["seeds.0", "integer"]),
        ({"seeds": [1, 1]}, ["seeds", "twice"]),
        ({"datasets": ["mnist"]}, ["datasets.0", "'fashion_mnist'", "'mnist'"]),
        ({"augmentations": ["flip"]}, ["augmentations.0", "'cutout'"]),
        ({"methods": ["adam"]}, ["'adam'", "sgd or sam"]),
        ({"methods": ["sam+"]}, ["'sam+'", "pof-centred"]),
        ({"methods": ["sam+fop"]}, ["'fop'", "frozen"]),
        ({"sam": {"rho": -1.0}}, ["sam", "rho must not be negative"]),
        ({"optimizer": {"momentum": 1.0}}, ["optimizer", "momentum", "[0, 1)"]),
        ({"schedule": {"kind": "cosine"}}, ["schedule.total_epochs", "= 3"]),
        ({"schedule": {"milestones": [3, 2]}}, ["milestones must ascend"]),
        ({"data": {"train_size": 10}}, ["batch_size 25", "train_size 10"]),
        ({"training": {"post_epochs": 0}}, ["training.post_epochs", "above 0"]),
        ({"augmentation": {"kind": "basic"}}, ["augmentation.kind", "'augmentations'"]),
        ({"augmentation": 3}, ["augmentation"]),
        ({"variants": {"x": {"gama": 1.0}}}, ["variants.x.gama", "gamma"]),
        ({"variants": {"x": {"gamma": -1.0}}}, ["variants.x", "gamma must not be negative"]),
        ({"variants": {"a/b": {"gamma": 1.0}}}, ["variants.a/b", "[a-z0-9_-]"]),
        ({"variants": {"x": {"epochs": 0}}}, ["variants.x.epochs", "from 1 to", "found 0"]),
        ({"variants": {"x": {"epochs": 2}}}, ["variants.x.epochs", "post_epochs", "found 2"]),
        ({"variants": {"x": {"epochs": 1.0}}}, ["variants.x.epochs", "whole number"]),
        ({"variants": {"pof": {"gamma": 1.0}}}, ["variants", "'pof'"]),
        ({"variants": {"x": {}}, "continued": {"x": {}}}, ["continued", "'x'"]),
        ({"continued": {"x": {"gamma": 1.0}}}, ["continued.x.gamma", "learning_rate, epochs"]),
        ({"continued": {"x": {"epochs": 0}}}, ["continued.x.epochs", "greater than 0"]),
        ({"override": [{"where": {}, "sam": {"rho": 0.1}}]}, ["override.0.where", "names no"]),
        (
            {"override": [{"where": {"dataset": "svhn"}, "sam": {"rho": 0.1}}]},
            ["override.0.where", "matches no cell"],
        ),
        (
            {"override": [{"where": {"dataset": "digits"}, "sam": {"roh": 0.1}}]},
            ["digits wrn_10_1 none", "sam.roh", "'rho'"],
        ),
        (
            {"override": [{"where": {"dataset": "digits"}, "augmentation": {"kind": "basic"}}]},
            ["override.0.augmentation.kind"],
        ),
        (
            {"override": [{"where": {"dataset": "digits"}, "training": {"post_epochs": 0}}]},
            ["digits wrn_10_1 none", "training.post_epochs"],
        ),
        (
            {
                "augmentations": ["none", "basic"],
                "override": [{"where": {"augmentation": "basic"}, "data": {"holdout": 5}}],
            },
            ["data.holdout", "every cell"],
        ),
    ],
)
def test_a_mistake_is_one_line_with_file_key_and_what_is_allowed(tmp_path, changes, said):
    message = refusal(tmp_path, changes)
    for part in said:
        assert part in message


@pytest.mark.parametrize("number", ["inf", "nan", "-inf"])
def test_numbers_that_are_none_are_refused(tmp_path, number):
    path = profile_file(tmp_path)
    path.write_text(path.read_text() + f"\n[pof]\ncap = {number}\n")
    with pytest.raises(UserError, match=r"pof\.cap: must be a finite number"):
        load_profile(str(path))


def test_what_is_not_toml_or_not_there_is_said_in_one_line(tmp_path):
    path = tmp_path / "broken.toml"
    path.write_bytes(b"title = \xff")
    with pytest.raises(UserError, match=r"broken\.toml: cannot be read as TOML"):
        load_profile(str(path))
    path.write_text("title = = 1")
    with pytest.raises(UserError, match=r"cannot be read as TOML .*line 1"):
        load_profile(str(path))
    with pytest.raises(UserError, match="no such file"):
        load_profile(str(tmp_path / "absent.toml"))
    with pytest.raises(UserError, match=r"no profile 'absent'; there are: .*smoke"):
        load_profile("absent")


def test_overrides_apply_to_the_cells_they_name_the_later_one_last(tmp_path):
    path = profile_file(
        tmp_path,
        {
            "datasets": ["digits", "svhn"],
            "augmentations": ["none", "basic"],
            "sam": {"rho": 0.05},
            "override": [
                {"where": {"dataset": "svhn"}, "sam": {"rho": 0.01}},
                {"where": {"dataset": "svhn", "augmentation": "basic"}, "sam": {"rho": 0.02}},
                {"where": {"augmentation": "basic"}, "optimizer": {"learning_rate": 0.3}},
            ],
        },
    )
    profile = load_profile(str(path))
    found = {
        names: (profile.cell(*names).sam.rho, profile.cell(*names).optimizer.learning_rate)
        for names in profile.cells()
    }
    assert found == {
        ("digits", "wrn_10_1", "none"): (0.05, 0.1),
        ("digits", "wrn_10_1", "basic"): (0.05, 0.3),
        ("svhn", "wrn_10_1", "none"): (0.01, 0.1),
        ("svhn", "wrn_10_1", "basic"): (0.02, 0.3),
    }


def test_variants_differ_from_the_pof_table_in_what_they_name_alone(tmp_path):
    path = profile_file(
        tmp_path, {"pof": {"cap": 7.0}, "variants": {"wide": {"gamma": 4.0}, "eval": {}}}
    )
    profile = load_profile(str(path))
    cell = profile.cell("digits", "wrn_10_1", "none")
    found = {
        name: (s.cap, s.gamma, s.direction)
        for name in ("pof", "pof-centred", "frozen", "wide")
        for s in [profile.pof_variant(name, cell)]
    }
    assert found == {
        "pof": (7.0, 2.0, "gradient"),
        "pof-centred": (7.0, 2.0, "centred"),
        "frozen": (7.0, 0.0, "gradient"),
        "wide": (7.0, 4.0, "gradient"),
    }
