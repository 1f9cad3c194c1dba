"""What MFU is a share of: stated before published, published before measured."""

import pytest
import torch

from megatron_rb.planner.device import Peak, published_peak
from megatron_rb.platform.cpu import CpuPlatform
from megatron_rb.train import peak
from megatron_rb.train.peak import known_peak, peak_of


class Named(CpuPlatform):
    """A platform whose device has this name."""

    def __init__(self, device: str) -> None:
        self.device_name = device

    def info(self):
        return {"device": self.device_name}


def test_what_is_stated_comes_first():
    assert known_peak(Named("NVIDIA H200"), "bf16", stated_tflops=1.5) == Peak(1.5e12, "stated")


def test_a_known_device_has_the_figure_of_its_data_sheet():
    found = known_peak(Named("NVIDIA H200"), "bf16")
    assert found == published_peak("NVIDIA H200", "bf16") and found.flops > 5e14


@pytest.mark.parametrize("device", ["Some CPU @ 2.0 GHz", "NVIDIA H100 PCIe"])
def test_of_a_device_that_no_description_is_of_nothing_is_known(device):
    assert known_peak(Named(device), "bf16") is None


def test_what_is_known_is_not_measured(monkeypatch):
    monkeypatch.setattr(peak, "_measured", lambda *arguments: pytest.fail("measured"))
    assert peak_of(Named("NVIDIA H200"), "bf16") == known_peak(Named("NVIDIA H200"), "bf16")


@pytest.mark.usefixtures("lone_mesh")
def test_an_unknown_device_is_measured_by_its_fastest_product(monkeypatch):
    monkeypatch.setattr(peak, "CPU_SIDE", 64)
    seconds = iter([4.0, 2.0, 8.0, 5.0, 5.0, 5.0, 5.0, 5.0])
    monkeypatch.setattr(peak, "_seconds", lambda a, platform: next(seconds))
    found = peak_of(Named("Some CPU"), "fp32")
    assert found == Peak(2 * 64**3 / 2.0, "measured: product of 64 x 64 matrices, fp32")


def test_a_product_takes_time():
    assert 0 < peak._seconds(torch.ones(64, 64), CpuPlatform()) < 10
