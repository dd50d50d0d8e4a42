"""Carries one run out: trains or post-trains, checkpoints, resumes, and writes the result."""

import hashlib
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks import assembly, checkpoint, compilation, environment, replicas
from benchmarks.errors import UserError
from benchmarks.files import CannotWrite, finite, sha256
from benchmarks.memory import keep_freed_memory
from benchmarks.plan import Plan
from benchmarks.run import SCHEMA, Run, RunSettings
from benchmarks.store import Busy, RunFolder, State, Store
from pof import data
from pof.ensemble import Ensemble, NotSideBySide
from pof.parallel import Processes
from pof.post_training import is_runaway
from pof.training import NonFiniteLoss, Trainer, evaluate

CHECKPOINT_SECONDS = 60.0
PROGRESS_SECONDS = 1.0


class Ending(StrEnum):
    """How a worker left a run."""

    DONE = "DONE"
    FAILED = "FAILED"
    INTERRUPTED = "INTERRUPTED"
    BUSY = "BUSY"


def choose_device(name: str = "auto") -> torch.device:
    """``auto`` is the GPU where there is one.

    Raises:
        UserError: The device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used; try cpu, cuda or auto") from error
    return device


def device_name(device: torch.device) -> str:
    """The model of the device that computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return environment.cpu_name()


def compute_deterministically() -> None:
    """Same settings, same seed, same machine: same bits. Full precision where fp32 is asked."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # What is filled is read by nobody, and filling it is not free.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def prepare_process() -> None:
    """What holds for a whole process that trains: its arithmetic, and what it does with memory."""
    compute_deterministically()
    keep_freed_memory()


def carry_out(run: Run, folder: RunFolder, work: Callable[[], bool]) -> tuple[Ending, str]:
    """Do a run's work under its lock; whatever goes wrong is written down and stops nobody else.

    Args:
        run: The run.
        folder: Its folder.
        work: Does the work; ``False`` if it stopped on the way.

    Returns:
        How it ended, and in one line why if it did not end well.
    """
    try:
        with folder.lock():
            if folder.state_of_files() in (State.DONE, State.FAILED):
                return Ending(folder.state_of_files()), ""
            return _guarded(run, folder, work)
    except Busy as error:
        return Ending.BUSY, str(error)
    except UserError as error:
        return Ending.FAILED, str(error)


def _guarded(run: Run, folder: RunFolder, work: Callable[[], bool]) -> tuple[Ending, str]:
    """Work, and write down what goes wrong.

    Raises:
        CannotWrite: That is not written down: with room made, the run continues.
        Busy: Nor is this: another process has what the work is about.
        NotSideBySide: Nor is this: alone, the run can be trained.
    """
    try:
        folder.create(run)
        return (Ending.DONE if work() else Ending.INTERRUPTED), ""
    except (CannotWrite, Busy, NotSideBySide):
        raise
    except Exception as error:
        expected = isinstance(error, UserError | NonFiniteLoss)
        reason = str(error) if expected else f"{type(error).__name__}: {error}"
        reason = reason.splitlines()[0]
        folder.write_failure(reason, traceback.format_exc())
        return Ending.FAILED, reason


class Worker:
    """Carries out runs of one plan, one after the other.

    Args:
        store: Where the run folders are.
        plan: The runs.
        data_dir: Where data sets are.
        device: What computes.
        should_stop: Asked after every step; ``True`` makes the run checkpoint and stop.
        checkpoint_seconds: Most time between two checkpoints.
    """

    def __init__(
        self,
        store: Store,
        plan: Plan,
        data_dir: Path,
        *,
        device: torch.device,
        should_stop: Callable[[], bool] = lambda: False,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
    ) -> None:
        prepare_process()
        self.store = store
        self.plan = plan
        self.data_dir = data_dir
        self.device = device
        self.should_stop = should_stop
        self.checkpoint_seconds = checkpoint_seconds
        # Of runs trained at once: the global generator and the compiler are the process's own.
        self.one_at_a_time = threading.Lock()
        self._runs = plan.by_identity()
        self._datasets: dict[str, data.Dataset] = {}
        self._subject: tuple[str, assembly.Subject] | None = None

    def carry_out(self, run: Run, company: "_Company | None" = None) -> tuple[Ending, str]:
        """Train a run to its end, or as far as it goes.

        Args:
            run: The run.
            company: The runs that it is trained in step with, if any.

        Returns:
            How it ended, and in one line why if it did not end well.
        """
        folder = self.store.folder(run)

        def train() -> bool:
            measured = compilation.measured if run.settings.compile else compilation.unmeasured
            with measured() as compiling:
                return _Attempt(self, run, folder, compiling, company).train()

        return carry_out(run, folder, train)

    def carry_out_at_once(
        self, runs: Sequence[Run], ended: Callable[[Run, Ending, str], None]
    ) -> None:
        """Train runs that differ in nothing but the seed, all at once.

        Where their networks cannot be computed side by side, one after the other.

        Args:
            runs: The runs.
            ended: Told of each how it ended; called from the run's own thread.
        """
        ensemble = Ensemble(len(runs), compile=runs[0].settings.compile)
        seeds = [run.settings.seed for run in runs]
        refused: list[tuple[Run, str]] = []
        broken: list[BaseException] = []

        def train(index: int, run: Run) -> None:
            try:
                ended(run, *self.carry_out(run, _Company(ensemble, index, seeds)))
            except NotSideBySide as error:
                refused.append((run, str(error)))
            except BaseException as error:
                broken.append(error)
            finally:
                ensemble.leave(index)

        threads = [
            threading.Thread(target=train, args=(index, run), name=run.name)
            for index, run in enumerate(runs)
        ]
        started = 0
        try:
            for thread in threads:
                thread.start()
                started += 1
        finally:
            for place in range(started, len(threads)):
                ensemble.leave(place)
            for thread in threads[:started]:
                thread.join()
        if broken:
            raise broken[0]
        for run, reason in sorted(refused, key=lambda pair: pair[0].settings.seed):
            print(f"{run.name}: not trained at once with other seeds: {reason}", file=sys.stderr)
            ended(run, *self.carry_out(run))

    def dataset(self, name: str) -> data.Dataset:
        """A data set, read once a process."""
        if name not in self._datasets:
            self._datasets[name] = assembly.load_dataset(name, self.data_dir)
        return self._datasets[name]

    def subject(self, settings: RunSettings) -> assembly.Subject:
        """A run's images on the device; those of the run before, where they are the same."""
        which = f"{settings.dataset} {settings.fingerprint} {settings.data.model_dump_json()}"
        if self._subject is None or self._subject[0] != which:
            self._subject = None
            dataset = self.dataset(settings.dataset)
            subject = assembly.prepare_subject(settings, dataset, self.device)
            self._subject = (which, subject)
        return self._subject[1]

    def parent_state(self, run: Run) -> tuple[dict[str, Any], str]:
        """The final checkpoint of the run's parent and its checksum.

        Raises:
            UserError: It is not finished, or its checkpoint is gone or damaged.
        """
        parent = self._runs[run.parent or ""]
        folder = self.store.folder(parent)
        result = folder.result()
        loaded = checkpoint.load_newest(folder.checkpoints)
        if loaded.state is None or loaded.checksum != result["checkpoint_sha256"]:
            raise UserError(
                f"{folder.path}: the final checkpoint is missing or damaged, and {run.name} starts "
                "from it; remove this folder and run again with --retry-failed to train it anew"
            )
        return loaded.state["trainer"], loaded.checksum


class _Company(NamedTuple):
    """Runs that are trained at once, as one of them sees it.

    Attributes:
        ensemble: Where they meet.
        place: This run's.
        seeds: Of all.
    """

    ensemble: Ensemble
    place: int
    seeds: Sequence[int]

    def met(self) -> set[int]:
        """Seeds that were computed side by side with this one, its own among them."""
        return {self.seeds[place] for place in self.ensemble.met(self.place)}


class _Attempt:
    """One process's work on one run, from its last checkpoint on."""

    def __init__(
        self,
        worker: Worker,
        run: Run,
        folder: RunFolder,
        compiling: compilation.Compiling,
        company: _Company | None,
    ) -> None:
        self.worker = worker
        self.run = run
        self.folder = folder
        self.compiling = compiling
        self.company = company
        self.earlier_seeds: set[int] = set()  # that it was trained at once with
        self.settings = run.settings
        self.warnings: list[str] = []
        self.starts = 0
        self.seconds_before = 0.0
        self.parent: dict[str, str] | None = None
        self._began = self._saved = self._shown = time.monotonic()
        self._epoch_began = (0, self._began)

    def train(self) -> bool:
        """Train to the end; ``False`` if asked to stop on the way."""
        settings = self.settings
        processes = Processes(0, settings.gpus_per_run)
        with self.worker.one_at_a_time:
            subject = self.worker.subject(settings)
            trainer = assembly.build_trainer(settings, subject, self.worker.device, processes)
            history = self._resume(trainer)
        if self.company is not None:
            objective = trainer.gradient.objective
            trainer.gradient.objective = self.company.ensemble.member(self.company.place, objective)
        with replicas.together(settings, trainer, self.worker.data_dir, self.worker.device):
            return self._train(trainer, subject, history)

    def _train(
        self, trainer: Trainer, subject: assembly.Subject, history: list[dict[str, Any]]
    ) -> bool:
        settings = self.settings
        self._write_environment(trainer)
        network, images = trainer.network, len(subject.train_labels)
        self._began = self._saved = time.monotonic()
        self._epoch_began = (trainer.step, self._began)
        self._show(trainer)
        while trainer.epoch < settings.last_epoch:
            began, first_step = time.monotonic(), trainer.step
            self._epoch_began = (first_step, began)
            record = trainer.train_epoch(lambda: self._after_step(trainer))
            if record is None:
                self._save(trainer)
                return False
            steps = trainer.batches.per_epoch
            share = (steps - first_step) / steps
            record["images_per_second"] = share * images / (time.monotonic() - began)
            last = trainer.epoch == settings.last_epoch
            if last or trainer.epoch % self.run.evaluate_every == 0:
                with self.worker.one_at_a_time:
                    loss, error = evaluate(
                        network,
                        subject.test_images,
                        subject.test_labels,
                        subject.normalise,
                        settings.precision,
                    )
                if not math.isfinite(loss):
                    raise UserError(f"the test loss is not finite after epoch {trainer.epoch}")
                record |= {"test_loss": loss, "test_error": error}
            entry = {"epoch": trainer.epoch} | {k: finite(v) for k, v in record.items()}
            self.folder.append_metrics(entry)
            history.append(entry)
            self._show(trainer)
            if not last and self._due():
                self._save(trainer)
            if not last and self.worker.should_stop():
                self._save(trainer)
                return False
        self._finish(trainer, history)
        return True

    def _resume(self, trainer: Trainer) -> list[dict[str, Any]]:
        """Bring the trainer to where the run stands; returns the epochs' records so far."""
        loaded = checkpoint.load_newest(self.folder.checkpoints)
        self.warnings += loaded.warnings
        state = loaded.state
        if state is not None and state["identity"] == self.run.identity:
            if self._recorded_until(state["trainer"]["epoch"]):
                self.starts = state["starts"] + 1
                self.seconds_before = state["seconds"]
                self.warnings = state["warnings"] + self.warnings
                self.parent = state["parent"]
                self.earlier_seeds.update(state.get("seeds_at_once", ()))
                trainer.load_state_dict(state["trainer"])
                return self.folder.keep_metrics(trainer.epoch)
            self.warnings.append("metrics.jsonl lacks epochs before the checkpoint: started over")
        elif loaded.warnings:
            self.warnings.append("no usable checkpoint: started over")
        if self.run.parent is not None:
            parent_state, checksum = self.worker.parent_state(self.run)
            self.parent = {"identity": self.run.parent, "checkpoint_sha256": checksum}
            assembly.inherit(trainer, parent_state, self.settings)
        return self.folder.keep_metrics(self.settings.first_epoch)

    def _recorded_until(self, epoch: int) -> bool:
        """Whether every epoch up to this one has its record."""
        recorded = [r["epoch"] for r in self.folder.metrics() if r["epoch"] <= epoch]
        return recorded == list(range(self.settings.first_epoch + 1, epoch + 1))

    def _after_step(self, trainer: Trainer) -> bool:
        """Between two steps: show a sign of life, checkpoint when due, stop when asked."""
        now = time.monotonic()
        if now - self._shown > PROGRESS_SECONDS:
            self._show(trainer)
        if self.worker.should_stop():
            return False
        if self._due():
            trainer.check_finite()
            self._save(trainer)
        return True

    def _due(self) -> bool:
        return time.monotonic() - self._saved > self.worker.checkpoint_seconds

    def _seconds(self) -> float:
        """Time spent so far; of what was spent on several seeds at once, this one's share."""
        share = 1 if self.company is None else max(1, len(self.company.met()))
        return self.seconds_before + (time.monotonic() - self._began) / share

    def _seeds_at_once(self) -> list[int]:
        """Seeds that this run was ever computed side by side with, its own among them."""
        met = () if self.company is None else self.company.met()
        return sorted(self.earlier_seeds.union(met))

    def _save(self, trainer: Trainer, *, keep: int = 2) -> str:
        state = {
            "identity": self.run.identity,
            "starts": self.starts,
            "seconds": self._seconds(),
            "warnings": self.warnings,
            "parent": self.parent,
            "trainer": trainer.state_dict(),
        }
        if seeds := self._seeds_at_once():
            state["seeds_at_once"] = seeds
        checksum = checkpoint.save(
            self.folder.checkpoints, state, epoch=trainer.epoch, step=trainer.step, keep=keep
        )
        self._saved = time.monotonic()
        return checksum

    def _show(self, trainer: Trainer) -> None:
        """Leave a sign of life: where the run stands and how fast it goes."""
        self._shown = time.monotonic()
        first_step, began = self._epoch_began
        trained = max(0, trainer.step - first_step) * self.settings.batch_size
        previous = self.folder.metrics()
        self.folder.write_progress(
            {
                "pid": os.getpid(),
                "epoch": trainer.epoch,
                "step": trainer.step,
                "steps": trainer.batches.per_epoch,
                "images_per_second": trained / (self._shown - began) if trained else None,
                "latest": previous[-1] if previous else None,
            }
        )

    def _write_environment(self, trainer: Trainer) -> None:
        """Note where this attempt runs, beside those before it where they differ."""
        here = environment.describe(
            device=device_name(self.worker.device),
            threads=torch.get_num_threads(),
            precision=self.settings.precision,
        )
        self.folder.add_environment(here, epoch=trainer.epoch, step=trainer.step)

    def _finish(self, trainer: Trainer, history: list[dict[str, Any]]) -> None:
        """Keep the final checkpoint alone, then write the result: the run is done."""
        checksum = self._save(trainer, keep=1)
        last = history[-1]
        result: dict[str, Any] = {
            "schema": SCHEMA,
            "identity": self.run.identity,
            "method": self.run.method,
            "epochs": [self.settings.first_epoch, self.settings.last_epoch],
            "test_error": last["test_error"],
            "test_loss": last["test_loss"],
            "train_error": last["train_error"],
            "train_loss": last["train_loss"],
            "seconds": round(self._seconds(), 3),
            "starts": self.starts + 1,
            "weights_sha256": weights_sha256(trainer.network),
            "classifier_sha256": weights_sha256(trainer.network.classifier),
            "checkpoint_sha256": checksum,
            "metrics_sha256": sha256((self.folder.path / "metrics.jsonl").read_bytes()),
            "parent": self.parent,
            "warnings": self.warnings
            + [f"earlier attempt failed: {reason}" for reason in self.folder.earlier_failures()],
        }
        if self.settings.compile:
            result["compiled"] = {
                "seconds": round(self.compiling.seconds, 3),  # of the last start
                "bits": "not promised: a resumed or repeated run may differ by rounding",
            }
        if seeds := self._seeds_at_once():
            result["at_once"] = {
                "seeds": seeds,
                "bits": "not promised: equal to a run trained alone up to rounding",
            }
        if self.settings.pof is not None:
            result["runaway"] = is_runaway([_with_nan(record) for record in history])
            result["capped_share"] = sum(r["capped_share"] for r in history) / len(history)
        self.folder.write_result(result)


def weights_sha256(module: nn.Module) -> str:
    """SHA-256 of every parameter and buffer, in order: equal if and only if all bits are."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _with_nan(record: dict[str, Any]) -> dict[str, float]:
    return {key: math.nan if value is None else value for key, value in record.items()}
