import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F

from pof.data.augmentation import Normalise
from pof.objective import Objective
from pof.post_training import PoFGradient
from pof.sam import SAMGradient
from pof.settings import OptimizerSettings, PoFSettings, SAMSettings, ScheduleSettings
from pof.training import NonFiniteLoss, PlainGradient, Trainer, evaluate, seed_for, sgd

METHODS = ["sgd", "sam", "pof"]
OPTIMIZER = OptimizerSettings(learning_rate=0.05, weight_decay=0.01)
SCHEDULE = ScheduleSettings(kind="cosine", total_epochs=6)


@pytest.fixture
def make_trainer(make_network, make_batches):
    def make(method, *, seed=0, smoothing=0.0, dropout=0.3, first_epoch=0, **stream):
        network = make_network(dropout=dropout, seed=seed)
        objective = Objective(network, label_smoothing=smoothing)
        parameters = list(network.parameters())
        if method == "sgd":
            gradient = PlainGradient(objective)
        elif method == "sam":
            gradient = SAMGradient(objective, SAMSettings(rho=0.1, m_sharpness=5))
        else:
            gradient = PoFGradient(
                objective,
                PoFSettings(gamma_sampling="uniform", batchnorm="update", direction="centred"),
                make_batches(order_seed=100 + seed, augmentation_seed=200 + seed, **stream),
                torch.Generator().manual_seed(300 + seed),
            )
            parameters = list(network.feature_extractor.parameters())
        return Trainer(
            network,
            make_batches(order_seed=400 + seed, augmentation_seed=500 + seed, **stream),
            gradient,
            sgd(parameters, OPTIMIZER),
            learning_rate=OPTIMIZER.learning_rate,
            schedule=SCHEDULE,
            first_epoch=first_epoch,
        )

    return make


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def flattened(value, path=""):
    """A nested state as {path: leaf}, to compare bit for bit."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return {path: value}
    return {k: v for key, part in items for k, v in flattened(part, f"{path}/{key}").items()}


def assert_same_state(a, b):
    a, b = flattened(a), flattened(b)
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == b[key].dtype, key
            assert torch.equal(value, b[key]), key
        else:
            assert value == b[key], key


def train_to(trainer, epochs):
    return [trainer.train_epoch() for _ in range(epochs - trainer.epoch)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("epoch", "step"), [(0, 1), (1, 2), (2, 1)])
def test_continuing_from_mid_epoch_is_bit_for_bit(make_trainer, method, epoch, step):
    torch.manual_seed(7)
    whole = make_trainer(method)
    records = train_to(whole, epoch)
    steps = iter(range(1, step + 1))
    paused = whole.train_epoch(lambda: next(steps) < step)
    assert paused is None
    assert (whole.epoch, whole.step) == (epoch, step)
    state = through_a_file(whole.state_dict())
    records += train_to(whole, 4)
    random = torch.get_rng_state()

    torch.manual_seed(99)
    continued = make_trainer(method, seed=1)
    continued.train_epoch()  # a trainer already used, of another seed: the state is everything
    continued.load_state_dict(state)
    assert train_to(continued, 4) == records[epoch:]
    assert_same_state(continued.state_dict(), whole.state_dict())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("method", METHODS)
def test_two_halves_are_the_whole(make_trainer, method):
    torch.manual_seed(7)
    whole = make_trainer(method)
    records = train_to(whole, 4)
    random = torch.get_rng_state()
    torch.manual_seed(7)
    half = make_trainer(method)
    first = train_to(half, 2)
    other = make_trainer(method, seed=1)
    other.load_state_dict(through_a_file(half.state_dict()))
    assert first + train_to(other, 4) == records
    assert_same_state(other.state_dict(), whole.state_dict())
    assert torch.equal(torch.get_rng_state(), random)


def test_pausing_changes_nothing(make_trainer):
    torch.manual_seed(7)
    whole = make_trainer("pof")
    expected = train_to(whole, 2)
    torch.manual_seed(7)
    paused = make_trainer("pof")
    records = []
    while len(records) < 2:
        record = paused.train_epoch(lambda: False)
        records += [record] if record else []
    assert records == expected
    assert_same_state(paused.state_dict(), whole.state_dict())


def test_loading_shares_no_storage_with_the_state(make_trainer):
    source = make_trainer("sgd")
    source.train_epoch()
    state = source.state_dict()
    kept = copy.deepcopy(state)
    other = make_trainer("sgd", seed=1)
    other.load_state_dict(state)
    other.train_epoch()
    assert_same_state(state, kept)


def test_a_state_in_mid_epoch_does_not_grow(make_trainer):
    trainer = make_trainer("sgd")
    trainer.train_epoch(lambda: False)
    state = trainer.state_dict()
    trainer.train_epoch()
    assert len(state["sizes"]) == len(state["losses"]) == 1


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_training_and_record_by_hand(make_trainer, smoothing):
    """Two epochs against Nesterov's formulas and torch's cross-entropy, a step at a time."""
    trainer = make_trainer("sgd", smoothing=smoothing, dropout=0.0)
    network = copy.deepcopy(trainer.network).train()
    batches = copy.deepcopy(trainer.batches)
    velocity = {p: torch.zeros_like(p) for p in network.parameters()}
    for epoch in range(2):
        losses, wrong, images_seen = 0.0, 0, 0
        for step in range(3):  # 22 images in batches of 8
            rate = 0.05 * 0.5 * (1 + math.cos(math.pi * (epoch + step / 3) / 6))
            images, labels = batches.draw()
            logits = network(images)
            log_p = logits.log_softmax(1)
            target = F.one_hot(labels, 4).double() * (1 - smoothing) + smoothing / 4
            loss = -(target * log_p).sum(1).mean()
            losses += float(loss.detach()) * len(labels)
            wrong += int((logits.argmax(1) != labels).sum())
            images_seen += len(labels)
            gradients = torch.autograd.grad(loss, list(network.parameters()))
            with torch.no_grad():
                for p, g in zip(network.parameters(), gradients, strict=True):
                    g = g + 0.01 * p
                    velocity[p] = 0.9 * velocity[p] + g
                    p -= rate * (g + 0.9 * velocity[p])
        record = trainer.train_epoch()
        assert record == {
            "train_loss": pytest.approx(losses / images_seen, rel=1e-10),
            "train_error": pytest.approx(100 * wrong / 22, rel=1e-12),
            "learning_rate": pytest.approx(rate, rel=1e-12),
        }
        assert images_seen == 22
    for p, q in zip(trainer.network.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_the_record_of_pof_holds_its_summary(make_trainer):
    trainer = make_trainer("pof")
    seen = []
    call = type(trainer.gradient)._perturbation

    def spy():
        result = call(trainer.gradient)
        seen.append(trainer.gradient.records[-1])
        return result

    trainer.gradient._perturbation = spy
    record = trainer.train_epoch()
    assert len(seen) == 3
    assert record["gradient_norm"] == pytest.approx(sum(float(r.gradient_norm) for r in seen) / 3)
    assert record["capped_share"] == pytest.approx(sum(float(r.capped) for r in seen) / 3)
    assert record.keys() >= {"train_loss", "learning_rate", "xi_median", "cosine", "expansion"}
    assert trainer.gradient.records == []


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_raises_with_its_place(make_trainer, method, value):
    trainer = make_trainer(method, first_epoch=3)
    trainer.train_epoch()
    steps = iter(range(10))

    def damage():
        if next(steps) == 0:
            with torch.no_grad():
                trainer.network.classifier.bias[0] = -value
        return True

    with pytest.raises(NonFiniteLoss, match="epoch 4, step 1") as raised:
        trainer.train_epoch(damage)
    assert (raised.value.epoch, raised.value.step) == (4, 1)


def test_a_pause_finds_it_too(make_trainer):
    trainer = make_trainer("sgd")
    with torch.no_grad():
        trainer.network.classifier.bias[0] = math.nan
    with pytest.raises(NonFiniteLoss):
        trainer.train_epoch(lambda: False)


@pytest.mark.parametrize("momentum", [True, False])
def test_post_training_starts_where_pre_training_ended(make_trainer, momentum):
    torch.manual_seed(7)
    source = make_trainer("sam")
    train_to(source, 2)
    state = source.state_dict()
    kept = copy.deepcopy(state)
    expected_draw = copy.deepcopy(source.batches).draw()

    target = make_trainer("pof", seed=1)
    target.start_from(state, momentum=momentum)
    assert target.epoch == 2
    assert_same_state(target.network.state_dict(), source.network.state_dict())
    assert torch.equal(copy.deepcopy(target.batches).draw()[0], expected_draw[0])
    theirs = {id(p): k for k, p in source.network.named_parameters()}
    buffers = {
        theirs[id(p)]: source.optimizer.state[p]["momentum_buffer"]
        for p in source.network.parameters()
    }
    for key, p in target.network.named_parameters():
        if momentum and key.startswith("feature_extractor."):
            buffer = target.optimizer.state[p]["momentum_buffer"]
            assert torch.equal(buffer, buffers[key]), key
            assert buffer.abs().max() > 0
        else:
            assert p not in target.optimizer.state, key

    classifier = copy.deepcopy(target.network.classifier.state_dict())
    train_to(target, 4)
    assert_same_state(target.network.classifier.state_dict(), classifier)
    assert_same_state(state, kept)  # what it started from is left alone


def test_post_training_continues_the_schedule(make_trainer):
    target = make_trainer("pof", first_epoch=4)
    record = target.train_epoch()
    last = 0.05 * 0.5 * (1 + math.cos(math.pi * (4 + 2 / 3) / 6))
    assert record["learning_rate"] == pytest.approx(last, rel=1e-12)


@pytest.mark.parametrize("method", ["sgd", "sam"])
def test_a_step_does_not_wait_for_the_host(make_trainer, no_host_access, method):
    trainer = make_trainer(method)
    trainer.batches.draw()
    with no_host_access():
        trainer.gradient(*trainer.batches.draw())
        trainer.optimizer.step()


def test_label_smoothing_is_torchs(make_network, make_batch):
    network = make_network()
    images, labels = make_batch()
    outcome = Objective(network, label_smoothing=0.2)(images, labels)
    logits = network(images).detach()
    hard = F.cross_entropy(logits, labels)
    uniform = -logits.log_softmax(1).mean()
    assert float(outcome.loss.detach()) == pytest.approx(
        0.8 * float(hard) + 0.2 * float(uniform), rel=1e-10
    )


def test_evaluation_by_hand_never_smooths_and_uses_running_statistics(make_network, monkeypatch):
    monkeypatch.setattr("pof.training.EVALUATION_BATCH", 7)  # 22 images: a smaller last chunk
    network = make_network(dropout=0.5)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (22, 6, 6, 2), generator=generator, dtype=torch.uint8)
    labels = torch.randint(4, (22,), generator=generator)
    normalise = Normalise((0.4, 0.6), (0.2, 0.3), device=torch.device("cpu"), dtype=torch.float64)
    before = copy.deepcopy(network.state_dict())
    loss, error = evaluate(network, pixels, labels, normalise)
    images = (pixels.permute(0, 3, 1, 2) / 255.0).double()
    images -= torch.tensor([0.4, 0.6]).double()[:, None, None]
    images /= torch.tensor([0.2, 0.3]).double()[:, None, None]
    logits = copy.deepcopy(network).eval()(images)
    assert loss == pytest.approx(float(F.cross_entropy(logits, labels).detach()), rel=1e-6)
    assert error == 100.0 * int((logits.argmax(1) != labels).sum()) / 22
    assert_same_state(network.state_dict(), before)


def test_training_after_evaluation_trains_in_training_mode(make_trainer):
    trainer = make_trainer("sgd")
    trainer.network.eval()
    before = trainer.network.feature_extractor[1].running_mean.clone()
    trainer.train_epoch()
    assert not torch.equal(trainer.network.feature_extractor[1].running_mean, before)


def test_seeds_are_apart_and_the_same_in_every_process():
    assert seed_for(0, "order") == 5231958647509549229  # sha256sum of "0/order", halved
    seeds = {seed_for(s, p) for s in range(20) for p in ("order", "range order", "gamma", "")}
    assert len(seeds) == 80
    assert all(0 <= s < 2**63 for s in seeds)
