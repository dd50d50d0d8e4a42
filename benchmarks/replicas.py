"""The other processes of a run on several GPUs: started with it, following it, gone with it.

The worker is the first process and alone reads and writes the run's folder. The others rebuild its
trainer, take over its state and train the same steps until they are ended: while the first one
evaluates or saves, they wait for it in the next step's sum. None outlives another: NCCL would wait
for hours for a process that is gone.
"""

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing

from benchmarks import assembly
from benchmarks.errors import UserError
from benchmarks.run import RunSettings
from pof.parallel import Processes
from pof.training import NonFiniteLoss, Trainer

_PATIENCE = timedelta(hours=2)  # for the first process's evaluations and checkpoints
_GRACE = 10.0  # seconds in which the first process may itself say what ended another


@contextmanager
def together(
    settings: RunSettings, trainer: Trainer, data_dir: Path, device: torch.device
) -> Iterator[None]:
    """Within the context, the run's other processes train along; nothing for a run on one GPU.

    Args:
        settings: Of the run.
        trainer: The first process's, at the step where they join.
        data_dir: Where data sets are.
        device: The first process's; the others take the GPUs that follow.

    Raises:
        UserError: There are fewer GPUs than the run asks for.
    """
    size = settings.gpus_per_run
    if size == 1:
        yield
        return
    first = device.index or 0
    if device.type == "cuda" and torch.cuda.device_count() < first + size:
        raise UserError(
            f"training.gpus_per_run is {size}, and of {torch.cuda.device_count()} GPUs here "
            f"{torch.cuda.device_count() - first} are left: ask the cluster for more, or lower it"
        )
    threads = torch.get_num_threads()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="pof-replicas-") as folder:
        torch.save(trainer.state_dict(), _state(folder))
        torch.set_num_threads(max(1, threads // size))
        others = [
            context.Process(
                target=_follow,
                args=(rank, settings.model_dump_json(), folder, data_dir, device.type, first),
                kwargs={"threads": max(1, threads // size), "parent": os.getpid()},
                daemon=True,
            )
            for rank in range(1, size)
        ]
        over = threading.Event()
        try:
            for other in others:
                other.start()
            threading.Thread(target=_end_with, args=(others, over), daemon=True).start()
            _join(folder, Processes(0, size), device)
            yield
        finally:
            over.set()
            for other in others:
                other.kill()
                other.join()
            if dist.is_initialized():
                dist.destroy_process_group()
            torch.set_num_threads(threads)


def _state(folder: str) -> Path:
    return Path(folder) / "state.pt"


def _join(folder: str, processes: Processes, device: torch.device) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all on one machine
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{folder}/meeting",
        rank=processes.rank,
        world_size=processes.size,
        timeout=_PATIENCE,
    )


def _follow(
    rank: int,
    dumped: str,
    folder: str,
    data_dir: Path,
    device_type: str,
    first: int,
    *,
    threads: int,
    parent: int,
) -> None:
    """Train along as process ``rank`` until ended, or until the first process is gone."""
    from benchmarks.worker import prepare_process

    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):  # the first one decides what they mean
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    prepare_process()
    torch.set_num_threads(threads)
    device = (
        torch.device(device_type, first + rank) if device_type == "cuda" else torch.device("cpu")
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    settings = RunSettings.model_validate_json(dumped)
    processes = Processes(rank, settings.gpus_per_run)
    subject = assembly.prepare_subject(
        settings, assembly.load_dataset(settings.dataset, data_dir), device
    )
    trainer = assembly.build_trainer(settings, subject, device, processes)
    trainer.load_state_dict(torch.load(_state(folder), map_location="cpu", weights_only=True))
    _join(folder, processes, device)
    with suppress(NonFiniteLoss):  # the first process says so
        while trainer.epoch < settings.last_epoch:
            trainer.train_epoch()
    threading.Event().wait()  # the first process may still be receiving what was sent


def _end_with(others: Sequence[BaseProcess], over: threading.Event) -> None:
    """End this process when another has ended before the training is over.

    It may be waiting for the other one inside a collective, where no exception reaches it. Whoever
    started it takes it for crashed; why the other one ended stands in the same log.
    """
    wait([other.sentinel for other in others])
    if not over.wait(_GRACE):
        print("one of the run's processes ended: ending them all", file=sys.stderr, flush=True)
        os._exit(1)


def _leave_with(parent: int) -> None:
    """End this process when the one that started it has, however that came."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
