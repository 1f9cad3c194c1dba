"""Which device a process binds itself to, by what it sees and what the launcher says."""

from types import SimpleNamespace

import pytest
import torch

from megatron_rb.platform.cpu import CpuPlatform
from megatron_rb.platform.cuda import CudaPlatform
from megatron_rb.platform.musa import MusaPlatform


@pytest.fixture
def bound(monkeypatch):
    """Makes a runtime of so many devices; returns the list of those that were chosen."""

    def build(devices: int, **env: str) -> list[int]:
        for name in ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        chosen: list[int] = []
        monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: chosen[-1])
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"u{index}"))
        return chosen

    return build


@pytest.mark.parametrize(
    "env", [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "GPU-1f"}, {"SLURM_STEP_GPUS": "3"}]
)
def test_a_process_that_was_given_one_device_takes_it(bound, env: dict[str, str]):
    chosen = bound(1, **env)
    CudaPlatform().set_device(3)
    assert chosen == [0]


def test_a_process_that_sees_all_devices_takes_that_of_its_local_rank(bound):
    chosen = bound(8, CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7")
    CudaPlatform().set_device(3)
    assert chosen == [3]


@pytest.mark.parametrize("env", [{}, {"CUDA_VISIBLE_DEVICES": ""}])
def test_a_machine_with_too_few_devices_is_told_from_that(bound, env: dict[str, str]):
    bound(1, **env)
    with pytest.raises(ValueError, match="local rank 1 has no cuda device, this process sees 1; start at most 1"):
        CudaPlatform().set_device(1)


def test_two_of_three_devices_are_too_few_whatever_names_them(bound):
    bound(2, CUDA_VISIBLE_DEVICES="0,1")
    with pytest.raises(ValueError, match="local rank 2 has no cuda device, this process sees 2"):
        CudaPlatform().set_device(2)


def test_devices_of_one_machine_have_identities_of_their_own(bound):
    bound(2, CUDA_VISIBLE_DEVICES="4,5")
    platform = CudaPlatform()
    identities = [(platform.set_device(rank), platform.device_identity())[1] for rank in (0, 1)]
    assert identities == ["u0 4,5 0", "u1 4,5 1"]


def test_accelerators_connect_gloo_lazily():
    assert CudaPlatform.collective_environment == MusaPlatform.collective_environment == {"TORCH_GLOO_LAZY_INIT": "1"}


def test_groups_for_device_tensors_alone_name_their_device_and_the_host_needs_none():
    assert CudaPlatform().device_backend == "cuda:nccl"
    assert MusaPlatform().device_backend == "musa:mccl"
    assert CpuPlatform().device_backend is None
