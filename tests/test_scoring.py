"""The authors' checkpoint layout: written from a network of ours, read back to the same bits."""

import csv
import json
import re

import pytest
import torch
from torch import nn

from benchmarks import authors
from benchmarks.errors import UserError
from pof.network import create
from tests.test_cli import command  # noqa: F401

STEM = "conv1.weight"


def network_of(depth=10, width=1, *, seed=0, **sizes):
    """A WRN of the authors' with statistics and a classifier unlike a fresh one's."""
    torch.manual_seed(seed)
    sizes = {"num_classes": 10, "in_chans": 1, "img_size": 8} | sizes
    network = create(f"wrn_{depth}_{width}", stride="authors", **sizes)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.uniform_(tensor, -0.3, 0.3)
    return network.eval()


def released(network, folder, name="200", *, module="module.", prefix="classifiers.0.", first=0):
    """Write a network as the authors did; ``first`` is where they count from."""
    folder.mkdir(exist_ok=True)

    def theirs(ours):
        block = re.fullmatch(r"layer(\d)\.(\d+)\.(\w+)\.(\w+)", ours)
        if block is None:
            return ours
        group, index, layer, kind = block.groups()
        layer = "shortcut.0" if layer == "shortcut" else layer
        return f"layer{int(group) - 1 + first}.num_{int(index) + first}.{layer}.{kind}"

    extractor = network.feature_extractor.state_dict()
    files = {
        "fet": {f"{module}{theirs(key)}": value for key, value in extractor.items()},
        "clf": {f"{module}{prefix}{k}": v for k, v in network.classifier.state_dict().items()},
    }
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1).state_dict()
    for part, param in files.items():
        torch.save({"param": param, "optim": optimizer}, folder / f"{part}_{name}.pth")
    return authors.Pair(name, folder / f"fet_{name}.pth", folder / f"clf_{name}.pth")


def edit(path, change):
    """Change the weights in a file."""
    content = torch.load(path, weights_only=True)
    change(content["param"])
    torch.save(content, path)


@pytest.mark.parametrize("module", ["", "module."])
@pytest.mark.parametrize("prefix", ["classifiers.0.", "classifier.", ""])
@pytest.mark.parametrize(("depth", "width", "first"), [(10, 1, 0), (16, 2, 1)])
def test_a_released_network_is_ours_to_the_bit(tmp_path, module, prefix, depth, width, first):
    network = network_of(depth, width, num_classes=7, in_chans=3)
    pair = released(network, tmp_path, module=module, prefix=prefix, first=first)
    name, loaded = authors.load(pair, image_size=8)
    images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert name == f"wrn_{depth}_{width}"
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(images), network(images))
        assert len(loaded(images).unique()) == 35


def test_the_authors_stride_is_theirs_and_not_the_standard_one(tmp_path):
    pair = released(network_of(), tmp_path)
    standard = create("wrn_10_1", num_classes=10, in_chans=1, img_size=8).eval()
    _, loaded = authors.load(pair, image_size=8)
    standard.load_state_dict(loaded.state_dict())
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert not torch.allclose(standard(images), loaded(images))


def test_ten_or_more_blocks_stay_in_order(tmp_path):
    network = network_of(64, 1)
    pair = released(network, tmp_path)
    edit(pair.extractor, lambda p: [p.update({k: p.pop(k)}) for k in sorted(p)])  # num_10 < num_2
    _, loaded = authors.load(pair, image_size=8)
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded(images), network(images))


def test_pairs_come_in_the_order_of_their_epochs(tmp_path):
    for name in ("1000", "200", "50"):
        released(network_of(), tmp_path, name)
    (tmp_path / "notes.pth").write_text("")
    assert [pair.name for pair in authors.pairs(tmp_path)] == ["50", "200", "1000"]


class Tripwire:
    """Something that runs code when it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("code in a checkpoint was executed",))


BROKEN = {
    "a cut-off file": (
        lambda p: p.extractor.write_bytes(p.extractor.read_bytes()[:1000]),
        "fet_200.pth: not a file of weights, or damaged",
    ),
    "a file that runs code": (
        lambda p: torch.save({"param": {"w": Tripwire()}}, p.extractor),
        "fet_200.pth: not a file of weights",
    ),
    "no weights": (
        lambda p: torch.save({"optim": {}}, p.classifier),
        "clf_200.pth: holds no 'param'",
    ),
    "no partner": (lambda p: p.classifier.unlink(), "clf_200.pth: no such file; both files"),
    "an unknown key": (
        lambda p: edit(p.extractor, lambda w: w.update(extra=torch.zeros(3))),
        "fet_200.pth: extra: unknown key",
    ),
    "an unknown layer of a block": (
        lambda p: edit(p.extractor, lambda w: w.update({"layer1.num_0.bn1.scale": torch.ones(16)})),
        "layer2.0.bn1.scale: unknown key",
    ),
    "a missing key": (
        lambda p: edit(p.extractor, lambda w: w.pop("module.layer1.num_0.bn2.bias")),
        "wrn_10_1: layer2.0.bn2.bias: missing",
    ),
    "a wrong shape": (
        lambda p: edit(p.extractor, lambda w: w.update({"module.bn_out.bias": torch.zeros(63)})),
        "wrn_10_1: bn_out.bias: has shape (63,), must have (64,)",
    ),
    "another classifier": (
        lambda p: edit(
            p.classifier, lambda w: w.update({"module.classifiers.0.weight": torch.zeros(10, 3)})
        ),
        "clf_200.pth: the classifier of wrn_10_1: weight: has shape (10, 3), must have (10, 64)",
    ),
    "two classifiers": (
        lambda p: edit(
            p.classifier, lambda w: w.update({"classifiers.1.weight": torch.ones(9, 9)})
        ),
        "clf_200.pth: expected one linear layer's weight and bias, found ",
    ),
    "a group too few": (
        lambda p: edit(p.extractor, lambda w: [w.pop(k) for k in list(w) if "layer2" in k]),
        "fet_200.pth: not a WRN: 2 blocks",
    ),
    "no first layer": (
        lambda p: edit(p.extractor, lambda w: w.pop(f"module.{STEM}")),
        "fet_200.pth: no convolution outside the blocks",
    ),
    "values that are not finite": (
        lambda p: edit(p.classifier, lambda w: w["module.classifiers.0.bias"].fill_(torch.nan)),
        "clf_200.pth: module.classifiers.0.bias: holds values that are not finite",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_such_network_is_refused_in_one_line(tmp_path, what):
    pair = released(network_of(), tmp_path)
    damage, said = BROKEN[what]
    damage(pair)
    with pytest.raises(UserError) as caught:
        authors.load(pair, image_size=8)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_score_measures_every_good_pair_and_names_the_others(tmp_path, command):  # noqa: F811
    folder = tmp_path / "released"
    network = network_of()
    released(network, folder, "200")
    released(network_of(seed=1), folder, "250")
    released(network_of(), folder, "7").classifier.unlink()
    released(network_of(in_chans=3), folder, "9")
    options = ("--dataset", "digits", "--data-dir", tmp_path, "--device", "cpu")
    where = ("--results-dir", tmp_path / "results", "--samples", 300)
    status, out, _ = command("score", "--authors", folder, *options, *where)
    assert status == 1
    assert f"error: {folder}/clf_7.pth: no such file" in out
    assert f"error: {folder}/fet_9.pth: a network for 3 channels and 10 classes; digits" in out
    records = json.loads((tmp_path / "results" / "authors" / "scores.json").read_text())["scores"]
    assert [(r["checkpoint"], r["split"]) for r in records] == [
        *(("200", "train"), ("200", "test")),
        *(("250", "train"), ("250", "test")),
    ]
    assert all(r["converged"] and r["residual"] <= 1e-6 and r["samples"] == 300 for r in records)
    with (tmp_path / "results" / "authors" / "scores.csv").open() as file:
        assert [row["top_eigenvalue"] for row in csv.DictReader(file)] == [
            f"{r['top_eigenvalue']:.6f}" for r in records
        ]
    rows = [line for line in out.splitlines() if re.match(r"\| +2[05]0 \|", line)]
    assert len(rows) == 4
    assert f"{records[0]['top_eigenvalue']:.4g}" in rows[0]


def test_a_score_is_what_the_network_does_to_the_test_set(tmp_path, command):  # noqa: F811
    from benchmarks.assembly import load_dataset

    network = network_of(seed=3)
    released(network, tmp_path / "released")
    status, _, _ = command(
        *("score", "--authors", tmp_path / "released", "--dataset", "digits", "--split", "test"),
        *("--data-dir", tmp_path, "--results-dir", tmp_path / "results", "--device", "cpu"),
    )
    assert status == 0
    (record,) = json.loads((tmp_path / "results" / "authors" / "scores.json").read_text())["scores"]
    digits = load_dataset("digits", tmp_path)
    pixels, labels = digits.test.images, digits.test.labels
    mean, std = digits.info.mean[0], digits.info.std[0]
    images = ((pixels.double() / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        logits = network.double()(images)
    wrong = int((logits.argmax(1) != labels).sum())
    assert record["error"] == pytest.approx(100 * wrong / len(labels), abs=1e-9)
    loss = nn.functional.cross_entropy(logits, labels)
    assert record["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert record["samples"] == len(labels)


def test_a_folder_without_such_files_and_an_unknown_data_set(tmp_path, command):  # noqa: F811
    status, _, err = command("score", "--authors", tmp_path)
    assert status == 1
    assert err == f"error: {tmp_path}: no files fet_N.pth and clf_N.pth in this folder\n"
    released(network_of(), tmp_path)
    status, _, err = command("score", "--authors", tmp_path, "--dataset", "mnist")
    assert status == 1
    assert err.startswith("error: no data set 'mnist'; there are: cifar10, ")
