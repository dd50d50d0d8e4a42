"""A profile expands into runs with lineage; nothing is trained twice.

An arm is trained in two stages. Arms of one base method share the first: SAM 0→200 is one run,
from which SAM 200→250 and PoF 200→250 both start.
"""

import dataclasses
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from benchmarks.errors import UserError
from benchmarks.files import read_json, write_json
from benchmarks.run import SCHEMA, Run, RunSettings
from benchmarks.settings import CellSettings, Continued, Profile, Strict, explain
from pof.settings import ScheduleSettings

FILE = "plan.json"


class Arm(Strict):
    """One row of the table: a method in a cell, and its final run for each seed.

    Attributes:
        dataset: Of the cell.
        backbone: Of the cell.
        augmentation: Of the cell.
        method: ``sgd``, ``sam``, ``sgd+pof``, ``sam+pof``, ….
        runs: Seed → identity of the run whose last epoch counts; empty if unavailable.
    """

    dataset: str
    backbone: str
    augmentation: str
    method: str
    runs: dict[int, str]


class Plan(Strict):
    """What a profile asks for, resolved.

    Attributes:
        schema_version: Of the runs' meaning.
        profile: The profile in full.
        arms: Rows of the table.
        runs: Parents before children.
        unavailable: Dataset → why it could not be had.
    """

    schema_version: int = SCHEMA
    profile: Profile
    arms: list[Arm]
    runs: list[Run]
    unavailable: dict[str, str]

    def by_identity(self) -> dict[str, Run]:
        """Runs by identity."""
        return {run.identity: run for run in self.runs}

    def write(self, path: Path) -> None:
        """Write the plan as JSON."""
        write_json(path, self.model_dump(mode="json"))


def file_of(runs_dir: Path, profile: str) -> Path:
    """Where the plan of a profile is kept while it is carried out."""
    return runs_dir / "plans" / f"{profile}.json"


def read(path: Path) -> Plan:
    """Read a plan.

    Raises:
        UserError: There is none, or it is of another version or broken.
    """
    content = read_json(path)
    if content.get("schema_version") != SCHEMA:
        raise UserError(
            f"{path}: schema version {content.get('schema_version')}, this code reads {SCHEMA}; "
            "run the profile again"
        )
    try:
        return Plan.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error)}") from error


def expand(profile: Profile, fingerprints: dict[str, str], unavailable: dict[str, str]) -> Plan:
    """Every run of a profile, each once, parents before children.

    Args:
        profile: What is asked for.
        fingerprints: Dataset → fingerprint, for those that could be had.
        unavailable: Dataset → why not, for the others.
    """
    runs: dict[str, Run] = {}
    arms: list[Arm] = []
    for dataset, backbone, augmentation in profile.cells():
        cell = profile.cell(dataset, backbone, augmentation)
        for method in profile.methods:
            finals: dict[int, str] = {}
            for seed in profile.seeds if dataset in fingerprints else []:
                stages = _stages(
                    profile, cell, method, (dataset, fingerprints[dataset], backbone), seed
                )
                runs |= {run.identity: run for run in stages if run.identity not in runs}
                finals[seed] = stages[-1].identity
            arms.append(
                Arm(
                    dataset=dataset,
                    backbone=backbone,
                    augmentation=augmentation,
                    method=method,
                    runs=finals,
                )
            )
    return Plan(
        profile=profile,
        arms=arms,
        runs=list(runs.values()),
        unavailable=unavailable,
    )


def _stages(
    profile: Profile,
    cell: CellSettings,
    method: str,
    subject: tuple[str, str, str],
    seed: int,
) -> list[Run]:
    """The runs of one arm and seed: the shared first stage, then the second."""
    dataset, fingerprint, backbone = subject
    training = cell.training
    base, _, variant = method.partition("+")

    def settings(algorithm: str, first: int, last: int) -> RunSettings:
        return RunSettings(
            dataset=dataset,
            fingerprint=fingerprint,
            data=cell.data,
            backbone=backbone,
            network=cell.network,
            augmentation=cell.augmentation,
            batch_size=training.batch_size,
            optimizer=cell.optimizer,
            schedule=cell.schedule,
            precision=training.precision,
            channels_last=training.channels_last,
            compile=training.compile,
            gpus_per_run=training.gpus_per_run,
            sync_batchnorm=training.sync_batchnorm,
            algorithm=algorithm,  # type: ignore[arg-type]
            sam=cell.sam if algorithm == "sam" else None,
            pof=profile.pof_variant(variant, cell) if algorithm == "pof" else None,
            first_epoch=first,
            last_epoch=last,
            seed=seed,
        )

    first = Run(
        settings=settings(base, 0, training.epochs),
        method=base,
        parent=None,
        evaluate_every=training.evaluate_every,
    )
    if not training.post_epochs:
        return [first]
    total = training.epochs + training.post_epochs
    if variant in profile.continued:
        going_on = _continued(settings(base, training.epochs, total), profile.continued[variant])
    elif variant:
        last = training.epochs + profile.variant_epochs(variant, cell)
        going_on = settings("pof", training.epochs, last)
    else:
        going_on = settings(base, training.epochs, total)
    second = Run(
        settings=going_on,
        method=method,
        parent=first.identity,
        evaluate_every=training.evaluate_every,
    )
    return [first, second]


def _continued(settings: RunSettings, terms: Continued) -> RunSettings:
    """The base method's second stage, on terms of its own."""
    changes: dict[str, Any] = {}
    if terms.learning_rate is not None:
        optimizer = dataclasses.replace(settings.optimizer, learning_rate=terms.learning_rate)
        changes = {"optimizer": optimizer, "schedule": ScheduleSettings(kind="constant")}
    if terms.epochs is not None:
        changes["last_epoch"] = settings.first_epoch + terms.epochs
    return settings.model_copy(update=changes)
