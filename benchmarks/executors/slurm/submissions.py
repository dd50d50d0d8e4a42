"""What was submitted, kept beside the runs: whoever comes later finds the jobs again.

An intention is written down before sbatch is called and its job's id after: a launcher that dies
in between leaves an intention without a job, and the next one looks for it by its name.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.executors.slurm.arrays import ActiveArray
from benchmarks.executors.slurm.journal import append
from benchmarks.files import read_json_lines

_FILE = "submissions.jsonl"


@dataclass
class Submission:
    """One call of sbatch.

    Attributes:
        name: Of its jobs, unlike any other's.
        tasks: The runs of each job, by identity.
        time: When it was intended, in seconds since 1970.
        job: Slurm's id; ``None``: not known.
        withdrawn: Whether it never came to be.
    """

    name: str
    tasks: tuple[tuple[str, ...], ...]
    time: float
    job: str | None = None
    withdrawn: bool = False


@dataclass(frozen=True)
class JobOf:
    """The job that a run was last given to.

    Attributes:
        id: Slurm's id of the job or the array's task.
        runs: All its runs, by identity.
        submission: Where it comes from.
    """

    id: str
    runs: tuple[str, ...]
    submission: Submission

    @property
    def array(self) -> ActiveArray:
        """The array it is a task of."""
        assert self.submission.job is not None
        return ActiveArray(self.submission.job, self.submission.tasks)


class Submissions:
    """The journal of submissions.

    Args:
        folder: ``RUNS_DIR/slurm``.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / _FILE

    def read(self) -> list[Submission]:
        """All of them, oldest first."""
        found: dict[str, Submission] = {}
        for line in read_json_lines(self.path):
            if "tasks" in line:
                tasks = tuple(tuple(task) for task in line["tasks"])
                found[line["name"]] = Submission(line["name"], tasks, line["time"])
            elif "job" in line:
                found[line["name"]].job = line["job"]
            else:
                found[line["name"]].withdrawn = True
        return list(found.values())

    def intend(self, name: str, tasks: Iterable[Iterable[str]]) -> None:
        """Note what is about to be submitted."""
        append(
            self.path, {"name": name, "tasks": [list(task) for task in tasks], "time": time.time()}
        )

    def record(self, name: str, job: str) -> None:
        """Note the job's id."""
        append(self.path, {"name": name, "job": job})

    def withdraw(self, name: str) -> None:
        """Note that an intention came to nothing."""
        append(self.path, {"name": name, "withdrawn": True})


def jobs_by_run(submissions: Iterable[Submission]) -> dict[str, JobOf]:
    """The job that each run was last given to, by the run's identity."""
    found: dict[str, JobOf] = {}
    for submission in submissions:
        if submission.job is None or submission.withdrawn:
            continue
        for index, task in enumerate(submission.tasks):
            alone = len(submission.tasks) == 1  # a single job is no array
            job = submission.job if alone else f"{submission.job}_{index}"
            found |= dict.fromkeys(task, JobOf(job, task, submission))
    return found
