"""Members of an ensemble train what each trains alone: in float64, and through the harness."""

import copy
import itertools
import threading

import pytest
import torch
from torch import nn

from benchmarks import worker as working
from benchmarks.executors import local
from benchmarks.store import State, Store
from benchmarks.worker import Ending, Worker
from pof.data.augmentation import Normalise
from pof.data.batches import Batches
from pof.data.official import DIGITS_FINGERPRINT
from pof.ensemble import Ensemble, NotSideBySide, side_by_side
from pof.ensemble import _Joined as Joined
from pof.network import create
from pof.objective import Objective
from pof.post_training import PoFGradient
from pof.sam import SAMGradient
from pof.settings import (
    AugmentationSettings,
    OptimizerSettings,
    PoFSettings,
    SAMSettings,
    ScheduleSettings,
)
from pof.training import PlainGradient, Trainer, sgd
from tests.harness import make_plan, record

BATCH, IMAGES = 8, 22  # the last batch has 6


def network(name, seed):
    torch.manual_seed(seed)
    made = create(
        name,
        num_classes=3,
        in_chans=3,
        img_size=8,
        stem="standard" if name.startswith("wrn") else "small",
    )
    return made.double().to(memory_format=torch.channels_last)


def trainer(method, seed, *, name="wrn_10_1", images=IMAGES):
    """A trainer whose everything depends on the seed."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (images, 8, 8, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 3, (images,), generator=generator)
    net = network(name, seed)

    def batches(stream):
        return Batches(
            pixels,
            labels,
            batch_size=BATCH,
            augmentation=AugmentationSettings(kind="basic", padding=1),
            normalise=Normalise(
                (0.5,) * 3, (0.25,) * 3, device=torch.device("cpu"), dtype=torch.float64
            ),
            order_seed=100 * seed + stream,
            augmentation_seed=100 * seed + stream,
        )

    objective, parameters = Objective(net, label_smoothing=0.1), list(net.parameters())
    if method == "sgd":
        gradient = PlainGradient(objective)
    elif method.startswith("pof"):
        settings = PoFSettings(batchnorm="eval" if method == "pof in evaluation" else "batch")
        gradient = PoFGradient(objective, settings, batches(2), torch.Generator())
        parameters = list(net.feature_extractor.parameters())
    else:
        settings = SAMSettings(rho=0.5, m_sharpness=4 if method == "sam in parts" else None)
        gradient = SAMGradient(objective, settings)
    return Trainer(
        net,
        batches(1),
        gradient,
        sgd(parameters, OptimizerSettings()),
        learning_rate=0.1,
        schedule=ScheduleSettings(kind="constant"),
    )


def in_step(trainers, epochs, *, compile=False):
    """Train them at once; each one's number of epochs may differ."""
    ensemble = Ensemble(len(trainers), compile=compile)
    records = [None] * len(trainers)

    def train(index, member):
        try:
            member.gradient.objective = ensemble.member(index, member.gradient.objective)
            records[index] = [member.train_epoch() for _ in range(epochs[index])]
        finally:
            ensemble.leave(index)

    threads = [threading.Thread(target=train, args=pair) for pair in enumerate(trainers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return records


def assert_same(mine, others):
    for (name, a), b in zip(mine.state_dict().items(), others.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("name", ["wrn_10_1", "test_resnet"])
@pytest.mark.parametrize("method", ["sgd", "sam", "sam in parts", "pof", "pof in evaluation"])
def test_members_train_what_each_trains_alone(method, name):
    epochs = [2, 2, 1]  # one leaves before the others
    together = [trainer(method, seed, name=name) for seed in range(3)]
    records = in_step(together, epochs)
    for seed, member in enumerate(together):
        alone = trainer(method, seed, name=name)
        start = copy.deepcopy(alone.network)
        expected = [alone.train_epoch() for _ in range(epochs[seed])]
        assert_same(member.network, alone.network)
        assert any(
            (a - b).abs().max() > 1e-3
            for a, b in zip(start.parameters(), alone.network.parameters(), strict=True)
        )
        for mine, other in zip(records[seed], expected, strict=True):
            assert mine == pytest.approx(other, rel=1e-7, nan_ok=True)
    assert any(
        not torch.equal(a, b)
        for a, b in zip(
            together[0].network.parameters(), together[1].network.parameters(), strict=True
        )
    )


@pytest.mark.parametrize("how", ["bf16", "compiled"])
def test_in_other_arithmetic_they_differ_from_those_alone_by_rounding(how, monkeypatch):
    compile_module = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda m, **more: compile_module(m, backend="aot_eager", **more)
    )

    def made(seed):
        member = trainer("sam", seed)
        if how == "bf16":
            member.network.float()
            member.gradient.objective.precision = "bf16"
            member.batches.normalise = Normalise(
                (0.5,) * 3, (0.25,) * 3, device=torch.device("cpu")
            )
            member.gradient = SAMGradient(member.gradient.objective, SAMSettings(rho=0.5))
        else:
            member.network.feature_extractor.compile(dynamic=False)
        return member

    try:
        together, alone = [[made(seed) for seed in range(2)] for _ in range(2)]
        records = in_step(together, [1, 1], compile=how == "compiled")
        for mine, other in zip(records, alone, strict=True):
            tolerance = 2e-2 if how == "bf16" else 1e-9
            assert mine[0]["train_loss"] == pytest.approx(
                other.train_epoch()["train_loss"], rel=tolerance
            )
    finally:
        torch.compiler.reset()


def test_one_network_computes_them_all(monkeypatch):
    """Two members' forwards are one forward of the joined network, whatever the batch."""
    calls = []
    joined_forward = nn.Conv2d.forward

    def forward(self, images):
        calls.append(self.groups)
        return joined_forward(self, images)

    members = [trainer("sgd", seed) for seed in range(2)]
    in_step(members, [1, 1])  # without counting
    members = [trainer("sgd", seed) for seed in range(2)]
    monkeypatch.setattr(nn.Conv2d, "forward", forward)
    in_step(members, [1, 1])
    layers = sum(isinstance(m, nn.Conv2d) for m in members[0].network.modules())
    probes = 3 * layers  # the joined network and both members are compared once
    assert len(calls) - probes == members[0].batches.per_epoch * layers
    assert calls[-layers:] == [2] * layers


def test_weights_are_shared_not_copied():
    networks = [network("wrn_10_1", seed).feature_extractor for seed in range(2)]
    before = [copy.deepcopy(n.state_dict()) for n in networks]
    joined = side_by_side(networks, torch.rand(2, 3, 8, 8))
    for one, kept in zip(networks, before, strict=True):
        for name, value in one.state_dict().items():
            assert torch.equal(value, kept[name])
    with torch.no_grad():
        for parameter in joined.parameters():
            parameter.add_(1.0)
    for one, kept in zip(networks, before, strict=True):
        for name, value in one.named_parameters():
            torch.testing.assert_close(value.detach(), kept[name] + 1.0)
            assert value.stride() == kept[name].stride() or min(value.shape) == 1


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(3, 4, 3), nn.GroupNorm(1, 4)],
        [nn.Conv2d(3, 4, 3), nn.GroupNorm(1, 4, affine=False)],
        [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)],
        [nn.Flatten(), nn.Linear(3 * 64, 4)],
        [nn.Conv2d(3, 4, 3), nn.Softmax(1)],
    ],
    ids=["affine group norm", "group norm", "dropout", "linear", "softmax"],
)
def test_what_works_across_channels_is_refused_and_left_as_it_was(layers):
    members = [nn.Sequential(*copy.deepcopy(layers), nn.Flatten()) for _ in range(2)]
    before = [copy.deepcopy(m.state_dict()) for m in members]
    with pytest.raises(NotSideBySide):
        side_by_side(members, torch.rand(2, 3, 8, 8))
    for member, kept in zip(members, before, strict=True):
        for name, value in member.state_dict().items():
            assert torch.equal(value, kept[name])
            assert value.untyped_storage().nbytes() == value.nbytes


def asking(members, ensemble, ask):
    """Let every member ask once, each in its own thread; what went wrong, by member."""
    errors = {}

    def work(index):
        objective = ensemble.member(index, members[index].gradient.objective)
        try:
            ask(index, objective, *members[index].batches.draw())
        except Exception as error:
            errors[index] = error
        finally:
            ensemble.leave(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(members))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_an_error_of_one_that_is_computed_alone_is_its_own():
    def ask(index, objective, images, labels):
        if index == 0:
            objective.gradient(images[:5], labels[:5] + 3)  # no such classes
        else:
            objective.gradient(images, labels)

    ensemble = Ensemble(2)
    assert list(asking([trainer("sgd", seed) for seed in range(2)], ensemble, ask)) == [0]
    assert ensemble.met(1) == set()


def test_too_little_memory_for_all_at_once_sends_each_on_its_own_way(monkeypatch):
    def fail(self, requests):
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(Joined, "answer", fail)
    members = [trainer("sgd", seed) for seed in range(2)]
    errors = asking(members, Ensemble(2), lambda _, objective, *batch: objective.gradient(*batch))
    assert {type(error) for error in errors.values()} == {NotSideBySide}
    assert len(errors) == 2


def test_an_error_reaches_every_member():
    members = [trainer("sgd", seed) for seed in range(2)]

    def ask(_, objective, images, labels):
        objective.gradient(images, labels + 3)  # no such classes

    assert len(asking(members, Ensemble(2), ask)) == 2


def sweep(folder, changes=None):
    plan = make_plan(
        folder,
        {"seeds": [0, 1, 2], "methods": ["sam", "sam+pof"]} | (changes or {}),
        fingerprints={"digits": DIGITS_FINGERPRINT},
    )
    return plan


def carry_out(plan, store, folder, runs, **options):
    """Carry runs out at once; how each ended."""
    endings = {}
    worker = Worker(store, plan, folder, device=torch.device("cpu"), **options)
    worker.carry_out_at_once(
        runs, lambda run, ending, reason: endings.update({run.identity: (ending, reason)})
    )
    return endings


def after(calls):
    """Answers yes from then on."""
    counter = itertools.count(1)
    return lambda: next(counter) > calls


def test_runs_at_once_are_recorded_as_such_and_resume(tmp_path):
    """Interrupted after some steps and continued: what each seed gives alone, up to rounding."""
    plan = sweep(tmp_path)
    alone, store = Store(tmp_path / "alone"), Store(tmp_path / "together")
    worker = Worker(alone, plan, tmp_path, device=torch.device("cpu"))
    for run in plan.runs:
        assert worker.carry_out(run)[0] is Ending.DONE
    for method in ("sam", "sam+pof"):
        runs = [run for run in plan.runs if run.method == method]
        runs = [run for run in runs if run.apart_from_seed == runs[0].apart_from_seed]
        assert len(runs) == 3
        endings = carry_out(plan, store, tmp_path, runs, should_stop=after(10))
        assert {ending for ending, _ in endings.values()} == {Ending.INTERRUPTED}
        endings = carry_out(plan, store, tmp_path, runs)
        assert {ending for ending, _ in endings.values()} == {Ending.DONE}
    for run in [run for run in plan.runs if store.folder(run).state() is State.DONE]:
        epochs, result = record(store, run)
        expected_epochs, expected = record(alone, run)
        assert result["train_loss"] == pytest.approx(expected["train_loss"], rel=2e-2)
        assert len(epochs) == len(expected_epochs)
        said = store.folder(run).result()
        assert said["at_once"]["seeds"] == [0, 1, 2]
        assert said["starts"] == 2
        assert "at_once" not in alone.folder(run).result()
        sizes = [
            next(s.folder(run).checkpoints.glob("*.pt")).stat().st_size for s in (store, alone)
        ]
        assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


def test_what_cannot_be_side_by_side_is_trained_one_after_the_other(tmp_path, capfd):
    plan = sweep(
        tmp_path,
        {"backbones": ["test_mambaout"], "methods": ["sgd"], "seeds": [0, 1]}
        | {"optimizer": {"learning_rate": 1e-3}},
    )
    alone, store = Store(tmp_path / "alone"), Store(tmp_path / "together")
    first = [run for run in plan.runs if run.parent is None]
    worker = Worker(alone, plan, tmp_path, device=torch.device("cpu"))
    for run in first:
        assert worker.carry_out(run) == (Ending.DONE, "")
    endings = carry_out(plan, store, tmp_path, first)
    assert set(endings.values()) == {(Ending.DONE, "")}
    assert "works across channels" in capfd.readouterr().err
    for run in first:
        assert record(store, run) == record(alone, run)  # bit for bit
        assert "at_once" not in store.folder(run).result()


def test_a_member_that_fails_does_not_hold_up_the_others(tmp_path, monkeypatch):
    plan = sweep(tmp_path, {"methods": ["sgd"]})
    first = [run for run in plan.runs if run.parent is None]
    store = Store(tmp_path / "runs")
    resume = working._Attempt._resume

    def fail_one(self, trainer):
        if self.settings.seed == 1:
            raise working.UserError("no luck")
        return resume(self, trainer)

    monkeypatch.setattr(working._Attempt, "_resume", fail_one)
    endings = carry_out(plan, store, tmp_path, first)
    expected = {0: (Ending.DONE, ""), 1: (Ending.FAILED, "no luck"), 2: (Ending.DONE, "")}
    assert {run.settings.seed: endings[run.identity] for run in first} == expected
    for run in first:
        if run.settings.seed != 1:
            assert store.folder(run).result()["at_once"]["seeds"] == [0, 2]


def test_a_seed_that_begins_beside_one_that_resumes_begins_as_it_would_alone(tmp_path, monkeypatch):
    """Both set the global generator, which initial weights are drawn from."""
    plan = sweep(tmp_path, {"methods": ["sgd"], "seeds": [0, 1]})
    first = [run for run in plan.runs if run.parent is None]
    store = Store(tmp_path / "runs")
    stopped = Worker(store, plan, tmp_path, device=torch.device("cpu"), should_stop=after(3))
    assert stopped.carry_out(first[0])[0] is Ending.INTERRUPTED
    begun, create = threading.Event(), working.assembly.network.create
    load = working.Trainer.load_state_dict

    def create_late(*arguments, **options):
        """Between the seed and the weights, time for the other to resume."""
        begun.set()
        threading.Event().wait(0.3)
        return create(*arguments, **options)

    def load_then(self, state):
        begun.wait(1.0)
        load(self, state)

    weights = {}
    train = working._Attempt._train

    def note(self, trainer, *rest):
        weights[self.settings.seed] = working.weights_sha256(trainer.network)
        return train(self, trainer, *rest)

    monkeypatch.setattr(working._Attempt, "_train", note)
    alone = Store(tmp_path / "alone")
    assert Worker(alone, plan, tmp_path, device=torch.device("cpu")).carry_out(first[1])[1] == ""
    expected = weights[1]
    monkeypatch.setattr(working.assembly.network, "create", create_late)
    monkeypatch.setattr(working.Trainer, "load_state_dict", load_then)
    carry_out(plan, store, tmp_path, first)
    assert weights[1] == expected


def test_a_sweep_trains_seeds_at_once_in_real_workers(tmp_path):
    plan = sweep(tmp_path, {"methods": ["sam+pof"]})
    plan_file = tmp_path / "plan.json"
    plan.write(plan_file)
    options = local.Options(
        runs_dir=tmp_path / "runs",
        plan_file=plan_file,
        data_dir=tmp_path,
        jobs=1,
        device="cpu",
        seeds_at_once=2,
    )
    finished = local.execute(plan, options, lambda *_: None)
    assert set(finished.states.values()) == {State.DONE}
    store = Store(tmp_path / "runs")
    seeds = {run.name: store.folder(run).result().get("at_once") for run in plan.runs}
    together = [said["seeds"] for said in seeds.values() if said]
    assert len(together) == 4  # of 3 seeds two, of SAM and of PoF
    assert all(len(pair) == 2 for pair in together)
