"""Selection of the platform."""

import pytest
import torch

from megatron_rb.platform import CAPABILITIES, get_platform, registry, use_platform
from megatron_rb.platform.base import ProbeResult
from megatron_rb.platform.cpu import CpuPlatform
from megatron_rb.platform.cuda import CudaPlatform
from megatron_rb.platform.musa import MusaPlatform


class _EntryPoint:
    def __init__(self, name, value, factory=CpuPlatform):
        self.name, self.value, self._factory = name, value, factory

    def load(self):
        return self._factory


def _always(available):
    return lambda self: ProbeResult(available, "in a test")


@pytest.fixture(autouse=True)
def fresh_registry(monkeypatch):
    monkeypatch.delenv(registry.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(registry, "entry_points", lambda group: [])
    registry._load_platform.cache_clear()
    registry._probe_platform.cache_clear()
    yield
    registry._load_platform.cache_clear()
    registry._probe_platform.cache_clear()


def test_built_in_platforms_need_no_installed_distribution():
    assert registry.available_platforms() == ["cpu", "cuda", "musa"]


def test_auto_takes_cpu_when_no_accelerator_is_present(monkeypatch):
    monkeypatch.setattr(CudaPlatform, "probe", _always(False))
    monkeypatch.setattr(MusaPlatform, "probe", _always(False))
    assert get_platform().name == "cpu"


def test_auto_takes_the_one_accelerator_present(monkeypatch):
    monkeypatch.setattr(CudaPlatform, "probe", _always(False))
    monkeypatch.setattr(MusaPlatform, "probe", _always(True))
    assert get_platform().name == "musa"


def test_two_accelerators_are_an_error_that_names_both(monkeypatch):
    monkeypatch.setattr(CudaPlatform, "probe", _always(True))
    monkeypatch.setattr(MusaPlatform, "probe", _always(True))
    with pytest.raises(ValueError, match="cuda .* musa .*choose one"):
        get_platform()


def test_environment_beats_the_probe_and_the_argument_beats_the_environment(monkeypatch):
    monkeypatch.setattr(CudaPlatform, "probe", _always(True))
    monkeypatch.setattr(MusaPlatform, "probe", _always(True))
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, "cuda")
    assert get_platform().name == "cuda"
    assert get_platform("musa").name == "musa"


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown platform 'tpu'; known are cpu, cuda, musa and auto"):
        get_platform("tpu")


def test_a_platform_that_is_absent_says_why(monkeypatch):
    monkeypatch.setattr(MusaPlatform, "probe", lambda self: ProbeResult(False, "torch_musa is not installed"))
    with pytest.raises(ValueError, match="platform musa cannot be used here: torch_musa is not installed"):
        get_platform("musa")


def test_plug_in_is_found_by_its_entry_point(monkeypatch):
    class Plugin(CpuPlatform):
        name = "npu"

    monkeypatch.setattr(registry, "entry_points", lambda group: [_EntryPoint("npu", "vendor:Npu", Plugin)])
    assert get_platform("npu").name == "npu"


def test_plug_in_cannot_take_a_built_in_name(monkeypatch):
    monkeypatch.setattr(registry, "entry_points", lambda group: [_EntryPoint("cuda", "vendor:Cuda")])
    with pytest.raises(ValueError, match="vendor:Cuda takes the built-in platform name 'cuda'"):
        get_platform("cpu")


def test_plug_in_that_does_not_load_is_one_sentence(monkeypatch):
    class Missing(_EntryPoint):
        def load(self):
            raise ImportError("No module named 'vendor'")

    plugins = [Missing("npu", "vendor:Npu"), _EntryPoint("tpu", "b:Tpu", dict), _EntryPoint("gpu", "c:Gpu")]
    monkeypatch.setattr(registry, "entry_points", lambda group: plugins)
    with pytest.raises(ValueError, match="npu cannot be loaded from vendor:Npu: No module named 'vendor'; repair or"):
        get_platform("npu")
    with pytest.raises(ValueError, match="platform tpu: b:Tpu is no megatron_rb.platform.Platform"):
        get_platform("tpu")
    with pytest.raises(ValueError, match="platform gpu is registered, but it calls itself cpu"):
        get_platform("gpu")


def test_own_entry_points_are_not_taken_for_plug_ins(monkeypatch):
    own = _EntryPoint("cpu", "megatron_rb.platform.cpu:CpuPlatform")
    monkeypatch.setattr(registry, "entry_points", lambda group: [own])
    assert get_platform("cpu").name == "cpu"


def test_two_plug_ins_of_one_name_are_an_error(monkeypatch):
    plugins = [_EntryPoint("npu", "a:Npu"), _EntryPoint("npu", "b:Npu")]
    monkeypatch.setattr(registry, "entry_points", lambda group: plugins)
    with pytest.raises(ValueError, match="registered by a:Npu and by b:Npu"):
        get_platform("cpu")


def test_the_answer_is_cached():
    assert get_platform("cpu") is get_platform("cpu")


def test_use_platform_replaces_the_answer_inside_the_block():
    replacement = CpuPlatform()
    with use_platform(replacement):
        assert get_platform("cuda") is replacement
    assert get_platform("cpu") is not replacement


def test_cuda_is_not_probed_through_a_musa_build(monkeypatch):
    monkeypatch.setattr(torch.version, "musa", "4.3", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert CudaPlatform().probe() == ProbeResult(False, "this torch is built for musa")


def test_unknown_capability_is_an_error_and_known_ones_answer():
    platform = CpuPlatform()
    assert all(platform.offers(capability) in (True, False) for capability in CAPABILITIES)
    with pytest.raises(ValueError, match="unknown platform capability 'magic'"):
        platform.offers("magic")
