"""Compiling is a setting: off it leaves no trace, on it says so and trains the same to rounding."""

import torch

from benchmarks import assembly, compilation
from benchmarks.plan import read
from benchmarks.store import Store
from benchmarks.worker import Ending, Worker
from pof import data
from tests.harness import make_plan

ON = {"training": {"compile": True}, "methods": ["sgd"]}


def test_off_it_is_no_part_of_a_runs_record_or_identity(tmp_path):
    plan = make_plan(tmp_path)
    assert "compile" not in plan.model_dump_json()
    assert plan.runs[0].settings.compile is False


def test_on_it_is_part_of_the_identity_and_survives_the_plans_file(tmp_path):
    off, on = make_plan(tmp_path), make_plan(tmp_path, ON)
    assert on.runs[0].identity != off.runs[0].identity
    on.write(tmp_path / "plan.json")
    assert read(tmp_path / "plan.json").runs[0].settings.compile


def backend(monkeypatch, name):
    """Compile by a backend that is there at once."""
    compile_module = torch.nn.Module.compile
    asked = []

    def replaced(module, **options):
        asked.append(options)
        compile_module(module, backend=name, **options)

    monkeypatch.setattr(torch.nn.Module, "compile", replaced)
    return asked


def test_a_compiled_run_trains_the_same_to_rounding_and_says_what_it_gave_up(tmp_path, monkeypatch):
    fingerprint = {"digits": data.load("digits", tmp_path).fingerprint}
    asked = backend(monkeypatch, "aot_eager")
    stores = {}
    try:
        for name, changes in (("plain", {"methods": ["sgd"]}), ("compiled", ON)):
            plan = make_plan(tmp_path, changes, fingerprints=fingerprint)
            store = Store(tmp_path / name)
            worker = Worker(store, plan, tmp_path, device=torch.device("cpu"))
            assert worker.carry_out(plan.runs[0]) == (Ending.DONE, "")
            stores[name] = store.folder(plan.runs[0]).result()
    finally:
        torch.compiler.reset()
        torch.use_deterministic_algorithms(False)
    assert asked == [{"dynamic": False}]
    assert "compiled" not in stores["plain"]
    assert stores["compiled"]["compiled"]["seconds"] > 0
    assert "not promised" in stores["compiled"]["compiled"]["bits"]
    for key in ("train_loss", "test_loss"):
        assert abs(stores["plain"][key] - stores["compiled"][key]) < 1e-3


def test_the_time_of_compiling_is_counted_within_the_context_only():
    function = torch.compile(lambda x: x.sin() + 1, backend="aot_eager", dynamic=False)
    with compilation.measured() as compiling:
        function(torch.ones(2))
        first = compiling.seconds
        function(torch.ones(2))
        assert compiling.seconds == first > 0
    function(torch.ones(3))
    assert compiling.seconds == first
    torch.compiler.reset()


def test_the_state_of_a_compiled_network_has_the_plain_names(tmp_path, monkeypatch):
    backend(monkeypatch, "eager")
    plan = make_plan(tmp_path, ON)
    built = assembly.build_network(
        plan.runs[0].settings, data.DATASETS["digits"], torch.device("cpu")
    )
    names = list(built.state_dict())
    built.feature_extractor.compile(dynamic=False)
    assert list(built.state_dict()) == names
