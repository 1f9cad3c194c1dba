"""What every platform must do; accelerators are tested where their device is present."""

import json

import pytest
import torch

from megatron_rb.platform.base import MemoryStats
from megatron_rb.platform.registry import BUILT_IN


@pytest.fixture(params=sorted(BUILT_IN))
def platform(request):
    platform = BUILT_IN[request.param]()
    probe = platform.probe()
    assert isinstance(probe.reason, str)
    if not probe.available:
        pytest.skip(probe.reason)
    platform.set_device(0)
    return platform


def test_current_device_holds_tensors(platform):
    device = platform.current_device()
    assert device.type == platform.device_type
    assert torch.ones(2, device=device).sum().item() == 2.0
    platform.synchronize()


def test_random_state_returns(platform):
    device = platform.current_device()
    platform.seed(5)
    state = platform.get_rng_state()
    first = torch.rand(4, device=device)
    platform.set_rng_state(state)
    assert torch.equal(torch.rand(4, device=device), first)
    assert state.dtype == torch.uint8 and state.device.type == "cpu"


def test_random_state_of_another_platform_is_refused(platform):
    with pytest.raises(ValueError, match="seed anew"):
        platform.set_rng_state(torch.zeros(7, dtype=torch.uint8))


def test_memory_is_in_bytes_and_info_is_json(platform):
    stats = platform.memory()
    assert isinstance(stats, MemoryStats)
    assert stats.total > 1 << 20
    json.dumps(platform.info())


def test_peak_memory_starts_anew(platform):
    if platform.memory().peak_allocated is None:
        pytest.skip("this system does not tell the peak")
    big = torch.ones(64 << 20, dtype=torch.uint8, device=platform.current_device())
    with_big = platform.memory().peak_allocated
    del big
    platform.reset_peak_memory()
    assert platform.memory().peak_allocated < with_big - (32 << 20)


def test_fp32_is_supported(platform):
    assert platform.supports(torch.float32)
    assert not platform.supports(torch.int8)
