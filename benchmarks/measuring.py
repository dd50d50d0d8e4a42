"""Measuring as work of its own: each finished run's measurement is a run of a store apart.

So whatever carries out runs (jobs on a cluster, above all) carries out measurements too, with
their states, their failures and their attempts in folders of their own.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.files import canonical_json, sha256
from benchmarks.plan import Plan
from benchmarks.run import Run
from benchmarks.store import State, Store

_FOLDER = "measuring"  # in RUNS_DIR
_TRAINED = "trained"  # in a request's folder: the plans of the runs measured


def root_of(runs_dir: Path, request: Mapping[str, Any]) -> Path:
    """The store of the measurements that one request asks for."""
    return runs_dir / _FOLDER / f"{request['block']}-{sha256(canonical_json(dict(request)))[:8]}"


def plan_file(root: Path, profile: str) -> Path:
    """The plan of the measurements of a profile's runs."""
    return root / "plans" / f"{profile}.json"


def roots(runs_dir: Path, profile: str) -> list[Path]:
    """The stores in which runs of a profile were to be measured."""
    found = sorted((runs_dir / _FOLDER).glob(f"*/plans/{profile}.json"))
    return [path.parents[1] for path in found]


def measurement_of(run: Run, trained: Store) -> Run:
    """The measurement of a finished run, as a run: its data are the trained network.

    Raises:
        UserError: The result of the run was edited or is damaged.
    """
    checkpoint = trained.folder(run).result()["checkpoint_sha256"]
    fingerprint = f"checkpoint:{run.identity}:{checkpoint}"
    return Run(
        settings=run.settings.model_copy(update={"fingerprint": fingerprint}),
        method=f"hessian-{run.method}",
        parent=None,
        evaluate_every=run.evaluate_every,
    )


def prepare(
    plan: Plan, profile: str, trained: Store, missing: Sequence[Run], request: Mapping[str, Any]
) -> tuple[Plan, Path, Path]:
    """Lay out the measurements that are missing, beside those that were made or are being made.

    Args:
        plan: Of the profile.
        profile: Its name.
        trained: Where its runs are.
        missing: Finished runs that lack a measurement.
        request: What to measure.

    Returns:
        The plan of the measurements, their store's root, and a copy of the profile's plan that
        stays as it is, whatever becomes of the profile.
    """
    root = root_of(trained.root, request)
    wanted = {run.identity for run in missing}
    measurements = []
    for run in plan.runs:
        if trained.folder(run).state_of_files() is not State.DONE:
            continue
        measurement = measurement_of(run, trained)
        folder = Store(root).folder(measurement)
        if run.identity in wanted:
            (folder.path / "result.json").unlink(missing_ok=True)  # made before, and lost since
        elif folder.state() not in (State.DONE, State.RUNNING):
            continue
        measurements.append(measurement)
    laid_out = plan.model_copy(update={"runs": measurements, "arms": [], "unavailable": {}})
    laid_out.write(plan_file(root, profile))
    digest = sha256(canonical_json(plan.model_dump(mode="json")))
    copy = root / _TRAINED / f"{digest[:16]}.json"
    plan.write(copy)
    return laid_out, root, copy
