"""The performance suite: its arithmetic on a clock of our own, and every row at a tiny size."""

import csv
import dataclasses
import io
import signal
import statistics

import pytest
import torch

from benchmarks.errors import UserError
from benchmarks.speed import accelerator, core, curvature, harness, row, subjects, suite, table
from benchmarks.speed.row import Bench, Row, Scale, Variant
from benchmarks.speed.table import Result
from tests.harness import profile_file

CPU = torch.device("cpu")
TINY = Scale(
    batch_size=8,
    images=24,
    trained_images=48,
    trained_epochs=2,
    whole_set=64,
    slow_set=32,
    network_set=16,
    matrix=32,
    loop_images=24,
    epoch_images=24,
    seeds=2,
    calibration_seconds=0.01,
    effort=core.Effort(repetitions=1, seconds=0.0),
)


@pytest.fixture(autouse=True)
def _leave_torch_as_it_was():
    threads = torch.get_num_threads()
    state = torch.get_rng_state()
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)
    torch.use_deterministic_algorithms(False)


class Clock:
    """Time that passes only in calls, and in what disturbs them."""

    def __init__(self):
        self.now = 0.0
        self.order = []

    def __call__(self):
        return self.now

    def side(self, name, seconds):
        durations = iter(seconds) if not isinstance(seconds, float) else None

        def call():
            self.order.append(name)
            self.now += seconds if durations is None else next(durations)

        return call


def test_sides_are_timed_in_turn_and_warmed_up_first():
    clock = Clock()
    effort = core.Effort(repetitions=3, seconds=0.0, warm_up=2)
    sides = {"a": clock.side("a", 2.0), "b": clock.side("b", 1.0)}
    timed = core.alternate(sides, effort, clock=clock)
    assert clock.order == ["a", "a", "b", "b", *["a", "b"] * 3]
    assert timed == {"a": [2.0] * 3, "b": [1.0] * 3}


def test_a_disturbance_of_both_sides_leaves_the_paired_ratio():
    clock = Clock()
    slow = [1.0, 1.0, 3.0, 1.0, 5.0, 1.0, 1.0, 1.0]  # the first is the warm-up
    sides = {
        "a": clock.side("a", [2.0 * s for s in slow]),
        "b": clock.side("b", slow),
    }
    timed = core.alternate(sides, core.Effort(seconds=0.0), clock=clock)
    found = core.ratios(timed["a"], timed["b"])
    assert found == [2.0] * 7
    assert core.median_and_spread(found) == (2.0, 0.0)


def test_short_calls_are_timed_together_and_time_is_used_up():
    clock = Clock()
    timed = core.alternate(
        {"a": clock.side("a", 0.01)}, core.Effort(repetitions=1, seconds=1.0), clock=clock
    )
    assert len(clock.order) == 1 + 5 * len(timed["a"])
    assert timed["a"] == pytest.approx([0.01] * 20, rel=1e-9)


def test_what_comes_before_a_side_is_not_timed_and_the_device_is_waited_for():
    clock = Clock()
    waiting = clock.side("wait", 0.25)
    timed = core.alternate(
        {"a": clock.side("a", 1.0)},
        core.Effort(repetitions=1, seconds=0.0),
        before={"a": clock.side("before", 100.0)},
        synchronise=waiting,
        clock=clock,
    )
    assert clock.order[-4:] == ["before", "wait", "a", "wait"]
    assert timed["a"] == [1.25]


def test_the_spread_is_between_the_quartiles():
    values = [5.0, 1.0, 2.0, 4.0, 3.0]
    assert core.median_and_spread(values) == (3.0, 2.0)
    assert core.median_and_spread([7.0]) == (7.0, 0.0)
    assert core.median_and_spread(values)[0] == statistics.median(values)


def bench(tmp_path):
    return Bench(CPU, tmp_path, TINY)


def test_a_goal_may_be_another_on_a_gpu(tmp_path):
    gpu = Bench(torch.device("cuda"), tmp_path, TINY)
    asked = made_up(lambda *_: [1.0], cuda_goal=0.5)
    on_cpu, on_gpu = (suite.measure(b, asked, Variant("")) for b in (bench(tmp_path), gpu))
    assert (on_cpu.goal, on_cpu.met) == ("2", "yes")
    assert (on_gpu.goal, on_gpu.met) == ("0.5", "no")
    same = suite.measure(gpu, made_up(lambda *_: [1.0]), Variant(""))
    assert (same.goal, same.met) == ("2", "yes")


def made_up(measure, **changes):
    return Row(**{"name": "a", "compares": "what", "measure": measure, "goal": 2.0} | changes)


@pytest.mark.parametrize(
    ("values", "at_least", "met"),
    [([1.0, 2.0, 9.0], False, "yes"), ([2.1], False, "no"), ([2.1], True, "yes")],
)
def test_a_goal_is_met_by_the_median(tmp_path, values, at_least, met):
    r = suite.measure(bench(tmp_path), made_up(lambda *_: values, at_least=at_least), Variant("v"))
    assert (r.row, r.met, r.repetitions) == ("a/v", met, str(len(values)))
    assert float(r.value) == statistics.median(values)


def test_a_missing_peer_is_said_in_its_row(tmp_path):
    def measure(*_):
        row.peer("a_module_that_nobody_has", "a-package")

    r = suite.measure(bench(tmp_path), made_up(measure), Variant(""))
    assert (r.value, r.met) == ("", "")
    assert "a-package is not installed" in r.missing
    assert "a-package" in render(table.show([r]))


def render(shown):
    from rich.console import Console

    console = Console(width=200, file=io.StringIO())
    console.print(shown)
    return console.file.getvalue()


def result(name, value):
    fields = {f.name: "" for f in dataclasses.fields(Result)}
    return Result(**fields | {"row": name, "value": value})


def test_rows_measured_alone_are_merged_in_order(tmp_path):
    path = tmp_path / "speed" / "a.csv"
    order = ["one", "two", "three"]
    assert not table.merge(path, {"cpu": "x"}, [result("three", "3")], order)
    assert not table.merge(path, {"cpu": "x"}, [result("one", "1"), result("gone", "0")], order)
    assert not table.merge(path, {"cpu": "x"}, [result("three", "4")], order)
    with path.open() as file:
        assert [(r["row"], r["value"]) for r in csv.DictReader(file)] == [
            ("one", "1"),
            ("three", "4"),
        ]


def test_results_of_another_machine_are_not_mixed_in(tmp_path):
    path = tmp_path / "a.csv"
    table.merge(path, {"torch": "1"}, [result("one", "1")], ["one", "two"])
    assert table.merge(path, {"torch": "2"}, [result("two", "2")], ["one", "two"])
    assert [r.row for r in table.read(path)] == ["two"]


def test_rows_measured_here_at_this_revision_are_known(tmp_path):
    path, here = tmp_path / "a.csv", {"torch": "1"}
    assert table.measured(path, here, "abc") == set()
    old, new = (dataclasses.replace(result(n, "1"), revision=r) for n, r in ("xa", "yb"))
    table.merge(path, here, [old, new], ["x", "y"])
    assert table.measured(path, here, "b") == {"y"}
    assert table.measured(path, {"torch": "2"}, "b") == set()


@pytest.fixture
def counted(monkeypatch):
    """A suite of two rows, the second of which breaks until it is mended; what was measured."""
    asked = []

    def measure(name, breaks):
        def values(*_):
            asked.append(name)
            if breaks and len(asked) < 3:
                raise RuntimeError("out of memory\nand more")
            return [1.0]

        return values

    rows = [made_up(measure(n, b), name=n) for n, b in (("one", True), ("two", False))]
    monkeypatch.setattr(suite, "ROWS", tuple(rows))
    monkeypatch.setattr(suite, "code_revision", lambda: {"revision": "f00" * 9, "dirty": False})
    return asked


def test_a_row_that_breaks_off_stops_no_other_and_is_tried_again(tmp_path, counted):
    from typer.testing import CliRunner

    from benchmarks.cli import app

    handler = signal.getsignal(signal.SIGTERM)

    def speed():
        options = ["--new", "--device", "cpu", "--results-dir", str(tmp_path)]
        return CliRunner().invoke(app, ["speed", *options])

    try:
        first, second, third = speed(), speed(), speed()
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert first.exit_code == 1
    assert "not measured: one: RuntimeError: out of memory" in first.output
    assert (second.exit_code, third.exit_code) == (0, 0)
    assert counted == ["one", "two", "one"]
    assert "every row asked for has its figure of this revision" in third.output
    (file,) = (tmp_path / "speed").glob("*.csv")
    assert [(r.row, r.value, r.revision) for r in table.read(file)] == [
        ("one", "1", "f00f00f00f00"),
        ("two", "1", "f00f00f00f00"),
    ]


def test_rows_are_chosen_by_name_variant_and_pattern():
    def chosen(*asked):
        return [suite.name_of(r, v) for r, v in suite.choose(asked, "cpu")]

    on_gpus_alone = {
        f"{name}/{v.name}" for name in ("bf16-step", "host-waits") for v in subjects.VARIANTS
    } | {suite.name_of(r, v) for r in accelerator.ROWS if r.device == "cuda" for v in r.variants}
    assert set(suite.names()) - set(chosen()) == on_gpus_alone
    assert {suite.name_of(r, v) for r, v in suite.choose((), "cuda")} == set(suite.names())
    assert len(set(suite.names())) == len(suite.names())
    assert chosen("sam-step/wrn_10_1-28") == ["sam-step/wrn_10_1-28"]
    assert len(chosen("sam-step")) == 4
    assert chosen("range-search", "sam-step/*-28") == [
        "sam-step/wrn_10_1-28",
        "sam-step/resnet10t-28",
        "range-search/wrn_10_1-28",
    ]
    with pytest.raises(UserError, match="no row 'nothing'; there are: sam-step"):
        suite.choose(["sam-step", "nothing"], "cpu")
    assert chosen("matmul-share", "range-search") == ["range-search/wrn_10_1-28"]
    with pytest.raises(UserError, match="matmul-share: nothing that is measured on cpu"):
        suite.choose(["matmul-share"], "cpu")


@pytest.fixture
def on_digits(monkeypatch):
    """Rows that need a trained network take one on the bundled digits."""
    small = Variant("small", "wrn_10_1", "digits")
    monkeypatch.setattr("benchmarks.speed.subjects.SMALL", small)
    return small


@pytest.fixture
def _small_profile(tmp_path, monkeypatch):
    changes = {"datasets": ["cifar10"], "methods": ["sgd"], "training": {"post_epochs": 0}}
    monkeypatch.setattr(harness, "_PROFILE", str(profile_file(tmp_path, changes)))


@pytest.fixture
def _compiled_by_eager(monkeypatch):
    """Compiled code need not be fast here, and is there at once."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda m, **options: compile_module(m, backend="eager", **options),
    )
    yield
    torch.compiler.reset()


def cheapest():
    """Every row, on its cheapest variant."""
    return [(r, (r.variants or (Variant(""),))[0]) for r in suite.ROWS if r.device in (None, "cpu")]


@pytest.mark.parametrize(
    ("chosen", "variant"), [pytest.param(r, v, id=r.name) for r, v in cheapest()]
)
@pytest.mark.usefixtures("_compiled_by_eager", "_small_profile")
def test_every_row_runs_at_a_tiny_size(tmp_path, chosen, variant, on_digits):
    r = suite.measure(bench(tmp_path), chosen, variant)
    assert r.missing == ""
    assert float(r.value) >= 0.0


def test_the_residual_of_a_peers_vector_is_that_of_the_matrix():
    matrix = torch.diag(torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64))
    theirs = curvature._PyHessian.__new__(curvature._PyHessian)
    theirs.vector = [torch.tensor([0.6]), torch.tensor([0.8, 0.0])]
    v = torch.tensor([0.6, 0.8, 0.0], dtype=torch.float64)
    value = v @ matrix @ v
    expected = float((matrix @ v - value * v).norm() / value)
    assert theirs.residual(matrix) == pytest.approx(expected, rel=1e-6)


class Told(Bench):
    """Runs every side once and takes it to last as long as it is told."""

    def alternate(self, sides, *, before=None):
        for call in sides.values():
            call()
        return {name: [SECONDS[name]] for name in sides}


SECONDS = {"matmul": 0.5, "step": 2.0, "sam": 12.0, "pof": 6.0, "ours": 3.0, "theirs": 3.0}
SECONDS |= {"at once": 1.0, "in turn": 4.0, "input": 1.0}
DIGITS = Variant("tiny", "wrn_10_1", "digits", {"precision": "bf16"})


def on_gpus():
    return [r for r in accelerator.ROWS if r.device == "cuda" and r.name != "peak-memory"]


@pytest.mark.parametrize("chosen", [pytest.param(r, id=r.name) for r in on_gpus()])
def test_every_row_of_a_gpu_runs_at_a_tiny_size(tmp_path, chosen):
    (value,) = chosen.measure(Told(CPU, tmp_path, TINY), DIGITS)
    flops = accelerator.sam_step_flops(bench(tmp_path), DIGITS)
    assert value == pytest.approx(
        {
            "matmul-share": flops / 2.0 / (2 * 32**3 / 0.5),  # both in operations a second
            "plain-loop": 1.0,  # as fast as itself
            "pair-minutes": (200 * 12.0 + 50 * 12.0 + 50 * 6.0) / 60.0,
            "seeds-at-once": 0.25,
            "input-share": 0.5,
            "pof-epoch": 0.5,
        }[chosen.name]
    )


def test_a_sam_step_is_counted_as_its_convolutions_say(tmp_path):
    def convolution(into, out, size, width=3):
        return 2 * into * out * width**2 * size**2

    forward = convolution(1, 16, 8) + 2 * convolution(16, 16, 8)
    forward += convolution(16, 32, 4) + convolution(32, 32, 4) + convolution(16, 32, 4, width=1)
    forward += convolution(32, 64, 2) + convolution(64, 64, 2) + convolution(32, 64, 2, width=1)
    forward += 2 * 64 * 10
    counted = accelerator.sam_step_flops(bench(tmp_path), DIGITS)
    assert counted == TINY.batch_size * 6 * forward


def test_a_plain_loops_sam_is_ours():
    """In float64, the step of the loop that we are compared with is the step that we take."""
    from pof.network import create
    from pof.objective import Objective
    from pof.sam import SAMGradient
    from pof.settings import SAMSettings

    torch.manual_seed(0)
    images, labels = torch.randn(6, 1, 8, 8).double(), torch.arange(6)
    weights = []
    for plain in (True, False):
        torch.manual_seed(1)
        network = create("wrn_10_1", num_classes=10, in_chans=1, img_size=8).double().train()
        before = [p.detach().clone() for p in network.parameters()]
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        if plain:
            accelerator.PlainSAM(network, optimizer, 0.05).step(images, labels)
        else:
            SAMGradient(Objective(network), SAMSettings(rho=0.05))(images, labels)
            optimizer.step()
        moved = zip(before, network.parameters(), strict=True)
        weights.append(torch.cat([(p - b).detach().flatten() for b, p in moved]))
    assert weights[0].norm() > 0.0
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=1e-9)


def test_seeds_at_once_are_trained_together_and_as_alone(tmp_path, monkeypatch):
    from pof import ensemble

    asked = []
    answer = ensemble._Joined.answer
    monkeypatch.setattr(
        ensemble._Joined,
        "answer",
        lambda self, requests: asked.append(len(requests)) or answer(self, requests),
    )
    variant = Variant("", "wrn_10_1", "digits")
    together, alone = (
        [subjects.trainer(bench(tmp_path), variant, "sam", seed=seed) for seed in (0, 1)]
        for _ in range(2)
    )
    call = accelerator.train_at_once(together, 2)
    call()
    call()
    assert asked == [2] * 8  # two gradients a step
    for one, other in zip(together, alone, strict=True):
        subjects.steps(other, 4)()
        statistics_of = one.network.state_dict(), other.network.state_dict()
        for name, value in statistics_of[0].items():
            torch.testing.assert_close(value, statistics_of[1][name], rtol=1e-3, atol=1e-5)


def test_who_fails_at_once_keeps_nobody_waiting(tmp_path):
    variant = Variant("", "wrn_10_1", "digits")
    trainers = [subjects.trainer(bench(tmp_path), variant, "sam", seed=seed) for seed in (0, 1)]

    def fail():
        raise ValueError("no images")

    trainers[0].batches.draw = fail
    with pytest.raises(ValueError, match="no images"):
        accelerator.train_at_once(trainers, 2)()


def test_memory_is_counted_from_before_the_work(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="cpu keeps no account of its memory"):
        bench(tmp_path).peak_memory(lambda: None)
    account = [5, 5]  # now, at most

    def work():
        account[1] = 12

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: account[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: account[1])
    assert Bench(torch.device("cuda"), tmp_path, TINY).peak_memory(work) == 7
    row_of_it = next(r for r in accelerator.ROWS if r.name == "peak-memory")
    (value,) = row_of_it.measure(Counted(CPU, tmp_path, TINY), DIGITS)
    assert value == 3.0


class Counted(Bench):
    """A device that says it has used 3 GiB."""

    def peak_memory(self, work):
        work()
        return 3 * 2**30
