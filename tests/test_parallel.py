"""Two gloo processes train what one process trains: up to rounding, in float64."""

import os
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn

from benchmarks import replicas
from benchmarks.errors import UserError
from benchmarks.executors.slurm.arrays import arrange
from benchmarks.executors.slurm.cluster import Cluster, Resources
from benchmarks.forecast import taken
from benchmarks.store import State, Store
from benchmarks.worker import Ending, Worker
from pof.data.augmentation import Normalise
from pof.data.batches import Batches
from pof.data.official import DIGITS_FINGERPRINT
from pof.network import Network, split
from pof.objective import Objective
from pof.parallel import ALONE, Processes, SharedObjective
from pof.post_training import PoFGradient
from pof.sam import SAMGradient
from pof.settings import (
    AugmentationSettings,
    OptimizerSettings,
    PoFSettings,
    SAMSettings,
    ScheduleSettings,
)
from pof.training import PlainGradient, Trainer, sgd
from tests.harness import finish, make_plan, record

BATCH, IMAGES = 8, 21  # the last batch has 5: of two parts, one is the larger


def network() -> Network:
    """A tiny network without BatchNorm, in float64."""
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    )
    return split(nn.Sequential(body, nn.Linear(16, 3)).double())


def trained(method: str, processes: Processes) -> tuple[list[torch.Tensor], list[dict]]:
    """Weights and records after three epochs, as ``processes`` train them."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (IMAGES, 6, 6, 1), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 3, (IMAGES,), generator=generator)
    net = network()

    def batches(seed):
        return Batches(
            images,
            labels,
            batch_size=BATCH,
            augmentation=AugmentationSettings(kind="basic", padding=1),
            normalise=Normalise((0.5,), (0.25,), device=torch.device("cpu"), dtype=torch.float64),
            order_seed=seed,
            augmentation_seed=seed,
        )

    objective, parameters = Objective(net), list(net.parameters())
    if method != "sam per replica" and processes.size > 1:
        objective = SharedObjective(objective, processes)
    if method == "sgd":
        gradient = PlainGradient(objective)
    elif method == "pof":
        gradient = PoFGradient(objective, PoFSettings(), batches(5), torch.Generator())
        parameters = list(net.feature_extractor.parameters())
    else:
        m = BATCH // 2 if method == "sam per replica" else None
        settings = SAMSettings(rho=0.5, m_sharpness=m)
        gradient = SAMGradient(objective, settings, processes=processes)
    trainer = Trainer(
        net,
        batches(4),
        gradient,
        sgd(parameters, OptimizerSettings()),
        learning_rate=0.2,
        schedule=ScheduleSettings(kind="constant"),
    )
    records = [trainer.train_epoch() for _ in range(3)]
    return [p.detach().clone() for p in net.parameters()], records


METHODS = ["sgd", "sam", "sam per replica", "pof"]


def take_part(rank: int, size: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size
    )
    both = {method: trained(method, Processes(rank, size)) for method in METHODS}
    torch.save(both, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What either of two processes has trained, by method."""
    folder = str(tmp_path_factory.mktemp("two"))
    multiprocessing.spawn(take_part, args=(2, folder), nprocs=2)
    return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_what_one_trains(two_processes, method):
    weights, records = trained(method, ALONE)
    untrained = list(network().parameters())
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(weights, untrained, strict=True))
    both = [process[method] for process in two_processes]
    for theirs, their_records in both:
        for mine, other in zip(weights, theirs, strict=True):
            torch.testing.assert_close(other, mine, rtol=1e-11, atol=1e-12)
        for mine, other in zip(records, their_records, strict=True):
            assert other == pytest.approx(mine, rel=1e-6, nan_ok=True)
    for one, other in zip(both[0][0], both[1][0], strict=True):
        assert torch.equal(one, other)  # no process drifts from the others


def test_ascending_on_its_own_is_another_method_than_ascending_together():
    together, apart = trained("sam", ALONE)[0], trained("sam per replica", ALONE)[0]
    assert max(float((a - b).abs().max()) for a, b in zip(together, apart, strict=True)) > 1e-4


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_the_parts_of_a_batch_are_the_batch(size):
    for count in range(1, 20):
        parts = [Processes(rank, size).part(count) for rank in range(size)]
        assert [i for part in parts for i in range(count)[part]] == list(range(count))
        sizes = [part.stop - part.start for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert sizes[0] > 0


TWO = {
    "methods": ["sam", "sam+pof"],
    "training": {"epochs": 1, "post_epochs": 1, "batch_size": 25, "gpus_per_run": 2},
}


def test_a_run_on_two_processes_is_resumed_bit_for_bit(tmp_path):
    plan = make_plan(tmp_path, TWO, fingerprints={"digits": DIGITS_FINGERPRINT})
    whole, broken = Store(tmp_path / "whole"), Store(tmp_path / "broken")

    def worker(store, **options):
        return Worker(store, plan, tmp_path / "data", device=torch.device("cpu"), **options)

    for run in plan.runs[:1]:
        assert worker(whole).carry_out(run) == (Ending.DONE, "")
        asked = iter(range(3))
        stopped = worker(broken, should_stop=lambda a=asked: next(a, None) is None)
        assert stopped.carry_out(run)[0] is Ending.INTERRUPTED
        assert broken.folder(run).state() is State.INTERRUPTED
        assert worker(broken).carry_out(run) == (Ending.DONE, "")
        assert record(broken, run) == record(whole, run)
        assert not dist.is_initialized()
        assert not multiprocessing.active_children()


def test_a_run_fails_when_one_of_its_processes_is_killed(tmp_path):
    plan = make_plan(tmp_path, TWO, fingerprints={"digits": DIGITS_FINGERPRINT})
    store, run = Store(tmp_path / "runs"), plan.runs[0]

    def kill_the_other() -> bool:
        for other in multiprocessing.active_children():
            other.kill()
        return False

    cpu = torch.device("cpu")
    worker = Worker(store, plan, tmp_path / "data", device=cpu, should_stop=kill_the_other)
    assert worker.carry_out(run)[0] is Ending.FAILED
    assert store.folder(run).state() is State.FAILED
    assert not multiprocessing.active_children()


def wait_in_vain() -> None:
    """As the first process does in a collective of NCCL whose other process is gone."""
    replicas._GRACE = 0.1
    other = multiprocessing.get_context("spawn").Process(target=os._exit, args=(1,))
    other.start()
    replicas._end_with([other], threading.Event())
    time.sleep(3600.0)


def test_the_first_process_does_not_wait_for_one_that_is_gone():
    first = multiprocessing.get_context("spawn").Process(target=wait_in_vain)
    first.start()
    first.join()
    assert first.exitcode == 1


def test_settings_that_leave_processes_idle_or_out_of_step_are_refused(tmp_path):
    for sync, m, message in (
        (True, 5, "sync_batchnorm contradicts sam.m_sharpness"),
        (False, 25, "makes fewer parts of a batch of 25 than training.gpus_per_run 2"),
    ):
        training = {**TWO["training"], "sync_batchnorm": sync}
        with pytest.raises(UserError, match=message):
            make_plan(tmp_path, {**TWO, "training": training, "sam": {"m_sharpness": m}})


def test_the_number_of_processes_is_part_of_a_runs_identity_unless_it_is_one(tmp_path):
    one, two = (
        make_plan(tmp_path, {**TWO, "training": {**TWO["training"], "gpus_per_run": n}})
        for n in (1, 2)
    )
    plain = make_plan(tmp_path, {"methods": TWO["methods"], "training": {"epochs": 1}})
    assert [run.identity for run in one.runs] == [run.identity for run in plain.runs]
    assert not {run.identity for run in one.runs} & {run.identity for run in two.runs}


def test_jobs_ask_for_as_many_times_what_one_gpu_needs(tmp_path):
    wants = {"gres": "gpu:a100:1", "cpus": 4, "memory": "16G"}
    cluster = Cluster(title="Made up", resources=Resources(**wants), runs_per_gpu=3)
    plan = make_plan(tmp_path, {**TWO, "seeds": [0, 1]})
    arrays = arrange(plan, {run.identity for run in plan.runs}, cluster, max_array_size=100)
    for array in arrays:
        asked = array.resources
        assert (asked.gres, asked.cpus, asked.memory) == ("gpu:a100:2", 8, "32G")
        assert {len(task) for task in array.tasks} == {1}  # none shares its GPUs
    assert Resources().times(2).gres is None
    assert Resources(gres="gpu").times(4).gres == "gpu:4"
    assert Resources(gres="gpu:a100:2,nvme:100").times(2).gres == "gpu:a100:4,nvme:100"
    assert Resources(gres="nvme:100,gpu:a100").times(2).gres == "nvme:100,gpu:a100:2"


def test_what_a_run_took_counts_on_each_of_its_gpus(tmp_path):
    for gpus in (1, 2):
        training = {**TWO["training"], "gpus_per_run": gpus}
        plan, store = make_plan(tmp_path, {**TWO, "training": training}), Store(tmp_path / "runs")
        finish(store, plan.runs[0], 5.0, seconds=60.0)
        assert taken(plan, store) == {plan.runs[0].identity: 60.0 * gpus}
