"""A cluster as validated data: what a job asks for, and how politely Slurm is spoken to.

Clusters are TOML files, checked as strictly as profiles are.
"""

import difflib
import json
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from benchmarks.errors import UserError
from benchmarks.settings import Strict, explain

# Options of sbatch that the executor sets itself, from other keys or for its own needs.
_MANAGED = {
    "array", "chdir", "constraint", "cpus-per-task", "dependency", "error", "gres", "job-name",
    "kill-on-invalid-dep", "mem", "nodes", "ntasks", "ntasks-per-node", "open-mode", "output",
    "partition", "account", "qos", "requeue", "no-requeue", "signal", "time", "wrap",
}  # fmt: skip


def minutes(limit: str) -> int:
    """Minutes of a time limit in Slurm's notation, rounded up: ``30``, ``12:00:00``, ``2-12``, ….

    Raises:
        ValueError: It is not one.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d\d))?(?::(\d\d))?", limit)
    if match is None:
        raise ValueError('must be a time like "30" (minutes), "12:00:00" or "2-00:00:00"')
    days, *rest = match.groups()
    numbers = [int(part) for part in rest if part is not None]
    if days is not None:
        hours, mins, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, mins, seconds = numbers
    else:  # MINUTES or MINUTES:SECONDS
        hours, (mins, seconds) = 0, [*numbers, 0][:2]
    total = (int(days or 0) * 24 + hours) * 60 + mins + (seconds > 0)
    if not total:
        raise ValueError("must be a minute at least: Slurm counts in minutes")
    return total


def _is_time(limit: str) -> str:
    minutes(limit)
    return limit


def _not_managed(options: dict[str, Any]) -> dict[str, Any]:
    for name in options:
        if name in _MANAGED:
            raise ValueError(f"{name!r} is set by another key or by the executor itself")
        if not re.fullmatch(r"[a-z][a-z0-9-]+", name):
            raise ValueError(
                f"{name!r} is not the long name of an option of sbatch, like mail-type"
            )
    return options


Variable = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]
Word = Annotated[str, Field(pattern=r"^[^\s#]+$")]


def _more_gpus(gres: str, times: int) -> str:
    """``gpu``, ``gpu:2``, ``gpu:a100`` or ``gpu:a100:2``, as many times; others unchanged."""
    if gres.split(":")[0] != "gpu":
        return gres
    kind, _, count = gres.rpartition(":")
    return f"{kind}:{int(count) * times}" if count.isdigit() else f"{gres}:{times}"


class Resources(Strict):
    """What one job of an array asks for. Keys left out are not passed to sbatch.

    Attributes:
        partition: Where jobs queue; several: ``"a,b"``.
        account: Who is charged.
        qos: Quality of service.
        gres: Generic resources, e.g. ``"gpu:1"`` or ``"gpu:a100:1"``.
        constraint: Features that a node must have, e.g. ``"a100"``.
        time_limit: In Slurm's notation. A run that needs longer is continued by further jobs.
        memory: Of the node, e.g. ``"16G"``.
        cpus: Cores a job.
        array_throttle: Most jobs of one array at once.
        signal_seconds: How long before its end a job is told, to checkpoint and requeue itself.
        sbatch: Any further options of sbatch by their long names: ``{ mail-type = "FAIL" }``.
    """

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    gres: Word | None = None
    constraint: Word | None = None
    time_limit: Annotated[str, AfterValidator(_is_time)] = "4:00:00"
    memory: Annotated[str, Field(pattern=r"^[1-9]\d*[KMGT]?$")] | None = None
    cpus: Annotated[int, Field(gt=0)] = 1
    array_throttle: Annotated[int, Field(gt=0)] = 32
    signal_seconds: Annotated[int, Field(ge=10, le=3600)] = 120
    sbatch: Annotated[dict[str, str | int | Literal[True]], AfterValidator(_not_managed)] = Field(
        default_factory=dict
    )

    def times(self, gpus: int) -> "Resources":
        """As many times the GPUs, cores and memory; other generic resources stay as they are."""
        gres, memory = self.gres, self.memory
        if gres is not None:
            gres = ",".join(_more_gpus(part, gpus) for part in gres.split(","))
        if memory is not None:
            number, unit = re.fullmatch(r"(\d+)(\D?)", memory).groups()  # type: ignore[union-attr]
            memory = f"{int(number) * gpus}{unit}"
        return self.model_copy(update={"gres": gres, "memory": memory, "cpus": self.cpus * gpus})

    @property
    def minutes(self) -> int:
        """The time limit in minutes."""
        return minutes(self.time_limit)


class StageResources(Strict):
    """What differs for the jobs of one algorithm; see ``Resources``."""

    sgd: dict[str, Any] = Field(default_factory=dict)
    sam: dict[str, Any] = Field(default_factory=dict)
    pof: dict[str, Any] = Field(default_factory=dict)


class Retries(Strict):
    """How often a run goes on after an attempt that did not end it, by cause; then it is FAILED.

    Attributes:
        preempted: Stopped in favour of somebody else's job.
        timed_out: The time limit came first.
        node_failed: The node failed, or the job ended without a trace.
        crashed: Its process died.
        idle: Attempts in a row that timed out without getting any further.
    """

    preempted: Annotated[int, Field(ge=0)] = 200
    timed_out: Annotated[int, Field(ge=0)] = 1000
    node_failed: Annotated[int, Field(ge=0)] = 5
    crashed: Annotated[int, Field(ge=0)] = 1
    idle: Annotated[int, Field(gt=0)] = 3


class Polling(Strict):
    """How often the launcher looks.

    Attributes:
        folders_seconds: Between two looks at the run folders.
        queue_seconds: Least time between two queries of Slurm, each for all jobs at once.
    """

    folders_seconds: Annotated[float, Field(gt=0)] = 5.0
    queue_seconds: Annotated[float, Field(gt=0)] = 30.0


class Cluster(Strict):
    """A cluster.

    Attributes:
        title: A line for people.
        description: What this file is for.
        python: The interpreter on the nodes; ``None``: the one that submits.
        runs_per_gpu: Runs that share one job and its GPU.
        max_array_size: Most jobs of an array; ``None``: ask Slurm.
        setup: Lines of shell before the work, e.g. ``"module load cuda"``.
        environment: Environment variables of the jobs.
        resources: Of a job.
        stages: What differs from ``resources`` for one algorithm.
        retries: Bounds.
        polling: Rates.
    """

    title: str
    description: str = ""
    python: str | None = None
    runs_per_gpu: Annotated[int, Field(gt=0)] = 1
    max_array_size: Annotated[int, Field(gt=0)] | None = None
    setup: list[str] = Field(default_factory=list)
    environment: dict[Variable, str] = Field(default_factory=dict)
    resources: Resources = Resources()
    stages: StageResources = StageResources()
    retries: Retries = Retries()
    polling: Polling = Polling()

    def resources_of(self, algorithm: str, gpus: int = 1) -> Resources:
        """What a job of ``sgd``, ``sam`` or ``pof`` asks for.

        Args:
            algorithm: Of its runs.
            gpus: That its run trains on (``training.gpus_per_run``); the file says what one needs.
        """
        changes = getattr(self.stages, algorithm)
        one = Resources.model_validate_json(json.dumps(self.resources.model_dump() | changes))
        return one if gpus == 1 else one.times(gpus)


def load_cluster(path: Path) -> Cluster:
    """Read and check a cluster.

    Raises:
        UserError: There is no such file, or something in it is wrong.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; slurm/clusters/ has examples to copy") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: cannot be read as TOML ({error})") from error
    where = ""
    try:
        cluster = Cluster.model_validate_json(json.dumps(tables, default=str))
        for algorithm in StageResources.model_fields:
            where = f"stages.{algorithm}."
            cluster.resources_of(algorithm)
    except ValidationError as error:
        raise UserError(f"{path}: {where}{_explain(error, bool(where))}") from error
    return cluster


def _explain(error: ValidationError, in_stage: bool) -> str:
    """The first thing wrong, in one line; unknown keys with those that are known."""
    first = error.errors()[0]
    if first["type"] != "extra_forbidden":
        return explain(error)
    owner: type[BaseModel] = Resources if in_stage else Cluster
    for part in first["loc"][:-1]:
        annotation = owner.model_fields[str(part)].annotation
        assert isinstance(annotation, type)
        owner = annotation
    allowed = list(owner.model_fields)
    close = difflib.get_close_matches(str(first["loc"][-1]), allowed, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    key = ".".join(str(part) for part in first["loc"])
    return f"{key}: unknown key{hint}; allowed here: {', '.join(allowed)}"
