"""What the tests of the harness share: a tiny profile, made-up results, forked processes."""

import copy
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import plan as planning
from benchmarks.files import canonical_json, sha256
from benchmarks.plan import Plan
from benchmarks.run import SCHEMA, Run
from benchmarks.settings import load_profile
from benchmarks.store import Store

ROOT = Path(__file__).parent.parent

# Six steps an epoch, three epochs in all: well under a second a run.
TINY = {
    "title": "Tiny",
    "seeds": [0],
    "datasets": ["digits"],
    "backbones": ["wrn_10_1"],
    "augmentations": ["none"],
    "methods": ["sgd", "sam", "sam+pof"],
    "data": {"train_size": 150},
    "training": {"epochs": 2, "post_epochs": 1, "batch_size": 25},
    "schedule": {"milestones": [2]},
}


def profile_file(folder: Path, changes: dict | None = None, *, name: str = "tiny") -> Path:
    """The tiny profile with changes (a table's keys are merged, ``None`` removes one) as TOML."""
    tables = copy.deepcopy(TINY)
    for key, value in (changes or {}).items():
        if value is None:
            del tables[key]
        elif isinstance(value, dict):
            tables[key] = tables.get(key, {}) | value
        else:
            tables[key] = value
    path = folder / f"{name}.toml"
    path.write_text(toml(tables))
    return path


def toml(tables: dict, prefix: str = "") -> str:
    """Nested dictionaries as TOML; lists of dictionaries become arrays of tables."""
    plain, nested = [], []
    for key, value in tables.items():
        name = f"{prefix}{key if key.isidentifier() else json.dumps(key)}"
        if isinstance(value, dict):
            nested.append(f"[{name}]\n{toml(value, name + '.')}")
        elif value is None:
            continue
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            nested += [f"[[{name}]]\n{toml(item, name + '.')}" for item in value]
        else:
            plain.append(f"{key} = {json.dumps(value)}\n")
    return "".join(plain + nested)


def make_plan(
    folder: Path,
    changes: dict | None = None,
    *,
    unavailable: dict[str, str] | None = None,
    fingerprints: dict[str, str] | None = None,
) -> Plan:
    """The plan of the tiny profile, data sets having made-up fingerprints unless given."""
    profile = load_profile(str(profile_file(folder, changes)))
    missing = unavailable or {}
    made_up = {name: f"sha256:{name}" for name in profile.datasets if name not in missing}
    return planning.expand(profile, fingerprints or made_up, missing)


ENVIRONMENT = {
    "code": {"revision": "0123456789abcdef", "dirty": False},
    "packages": {"torch": "2", "timm": "1"},
    "python": "3.11",
    "device": "a processor",
    "threads": 1,
    "precision": "fp32",
}


def finish(store: Store, run: Run, test_error: float, **more) -> None:
    """Make up the record of a finished run."""
    folder = store.folder(run)
    folder.create(run)
    folder.add_environment(ENVIRONMENT, epoch=0, step=0)
    epoch = {"epoch": run.settings.last_epoch, "test_error": test_error, "learning_rate": 0.1}
    folder.append_metrics(epoch)
    folder.write_result(
        {
            "schema": SCHEMA,
            "identity": run.identity,
            "test_error": test_error,
            "test_loss": 0.5,
            "train_error": 1.0,
            "train_loss": 0.25,
            "seconds": 1.5,
            "metrics_sha256": sha256(canonical_json(epoch) + "\n"),
            "warnings": [],
        }
        | more
    )


def record(store: Store, run: Run) -> tuple[list, dict]:
    """What must not depend on interruptions: the weights and every epoch's numbers."""
    folder = store.folder(run)
    timed = {"images_per_second"}
    epochs = [{k: v for k, v in e.items() if k not in timed} for e in folder.metrics()]
    result = folder.result()
    kept = ("weights_sha256", "test_error", "test_loss", "train_error", "train_loss")
    return epochs, {key: result[key] for key in kept} | {"runaway": result.get("runaway")}


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def wait_until(condition: Callable[[], object], seconds: float = 120.0) -> None:
    """Wait for something to become true, and fail if it does not."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def fork(function: Callable[[], None]) -> int:
    """Run a function in a child process that shares what is loaded; returns its id.

    The child exits with 0 if the function returns, with 1 if it raises.
    """
    child = os.fork()
    if child:
        return child
    try:
        function()
    except BaseException:
        os._exit(1)
    os._exit(0)


def exit_status(child: int) -> int:
    """Wait for a child; negative: the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
