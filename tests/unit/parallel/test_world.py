"""The world as the environment tells it, and the joining of it."""

import os

import pytest
import torch.distributed as dist

from megatron_rb.parallel import world
from megatron_rb.parallel.world import (
    cpu_threads_of_rank,
    leave_world,
    start_process_group,
    world_from_environment,
)
from megatron_rb.platform.cpu import CpuPlatform

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "MASTER_ADDR")


@pytest.fixture
def environment(monkeypatch):
    """Sets the variables of a world and takes away all others."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)

    def state(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return state


@pytest.mark.parametrize(
    ("configured", "omp", "ranks", "threads"),
    [(3, "1", "1", 3), (0, "5", "1", 5), (0, "4,2", "1", 4), (0, "", "1", 8), (0, "none", "2", 4), (0, "0", "64", 1)],
)
def test_threads_of_a_process(configured, omp, ranks, threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", omp)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    assert cpu_threads_of_rank(configured) == threads


TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}
SRUN = {"SLURM_PROCID": "6", "SLURM_LOCALID": "2", "SLURM_NTASKS": "12"}


@pytest.mark.parametrize(
    ("variables", "found"),
    [({}, (0, 0, 1)), (TORCHRUN, (5, 1, 8)), (SRUN, (6, 2, 12)), (TORCHRUN | SRUN, (5, 1, 8))],
)
def test_torchrun_comes_before_slurm_and_a_lone_process_is_rank_0_of_1(environment, variables, found):
    environment(**variables)
    assert world_from_environment() == found


class Device(CpuPlatform):
    """A platform whose process sees so many devices, the first of this identity."""

    def __init__(self, identity: str = "", count: int = 1) -> None:
        self.identity, self.count, self.taken = identity, count, []

    @property
    def collective_environment(self) -> dict[str, str]:
        return {"A_VARIABLE_OF_THE_PLATFORM": "7"}

    def device_identity(self) -> str:
        return self.identity

    def device_count(self) -> int:
        return self.count

    def set_device(self, local_rank: int) -> None:
        self.taken.append(local_rank)


def test_a_lone_process_makes_a_world_of_its_own_and_leaves_it(environment):
    environment(A_VARIABLE_OF_THE_PLATFORM="")
    del os.environ["A_VARIABLE_OF_THE_PLATFORM"]  # what the platform sets is taken away behind the test
    platform = Device()
    start_process_group(platform, timeout_minutes=1)
    try:
        assert (dist.get_world_size(), dist.get_backend(), platform.taken) == (1, "gloo", [0])
        assert os.environ["A_VARIABLE_OF_THE_PLATFORM"] == "7"
        start_process_group(platform, timeout_minutes=1)  # joined already: nothing happens
        assert platform.taken == [0]
    finally:
        leave_world()
    assert not dist.is_initialized()


def test_what_the_user_sets_is_not_changed_by_the_platform(environment):
    environment(A_VARIABLE_OF_THE_PLATFORM="mine")
    start_process_group(Device(), timeout_minutes=1)
    leave_world()
    assert os.environ["A_VARIABLE_OF_THE_PLATFORM"] == "mine"


def test_one_of_several_processes_without_an_address_is_refused(environment):
    environment(WORLD_SIZE="4", RANK="1")
    with pytest.raises(ValueError, match="WORLD_SIZE is 4 but MASTER_ADDR is not set; start with `rb launch` or"):
        start_process_group(Device(), timeout_minutes=1)


@pytest.fixture
def store(monkeypatch):
    """What the ranks tell each other, without a world."""
    store = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    return store


@pytest.mark.usefixtures("store")
def test_two_ranks_of_a_machine_on_one_device_are_refused_with_both_numbers():
    world._check_own_device(Device("GPU-7"), 0)
    with pytest.raises(ValueError, match=r"local ranks 0 and 1 of .* see one and the same cpu device \(GPU-7\)"):
        world._check_own_device(Device("GPU-7"), 1)


@pytest.mark.usefixtures("store")
def test_ranks_with_devices_of_their_own_pass():
    for local_rank in range(3):
        world._check_own_device(Device(f"GPU-{local_rank}"), local_rank)


@pytest.mark.usefixtures("store")
def test_ranks_that_see_all_devices_take_theirs_by_number_and_are_not_compared():
    for local_rank in range(2):
        world._check_own_device(Device("GPU-0", count=2), local_rank)


def test_a_device_without_an_identity_is_told_to_nobody(store):
    world._check_own_device(Device(""), 0)
    assert store.num_keys() == 0


def test_ranks_of_other_machines_are_not_compared(store, monkeypatch):
    world._check_own_device(Device("GPU-7"), 0)
    monkeypatch.setattr(world.socket, "gethostname", lambda: "another")
    store.set(f"device/another/{world.BOOT_ID.read_text().strip() if world.BOOT_ID.is_file() else ''}/0", "GPU-8")
    world._check_own_device(Device("GPU-7"), 1)
