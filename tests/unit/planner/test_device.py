"""Descriptions of devices: shipped ones load, incomplete ones are refused by name."""

from importlib import resources
from pathlib import Path

import pytest

from megatron_rb.planner.device import device_from_text, device_names, load_device

H200 = (resources.files("megatron_rb.conf") / "device" / "h200.yaml").read_text()


@pytest.mark.parametrize("name", device_names())
def test_shipped_device_loads_with_a_source_for_every_figure(name: str):
    assert load_device(name).peak_flops
    lines = (resources.files("megatron_rb.conf") / "device" / f"{name}.yaml").read_text().splitlines()
    section = ""
    for line in lines:
        if line.startswith("#"):
            continue
        section = line if not line.startswith(" ") else section
        figure = any(char.isdigit() for char in line.partition(":")[2].partition("#")[0])
        assert "#" in line or not figure or section.startswith(("name", "efficiency")), f"{name}: {line}"


def test_vendor_claims_are_marked():
    for name in ("mtt_s4000", "mtt_s5000"):
        assert "vendor claim" in (resources.files("megatron_rb.conf") / "device" / f"{name}.yaml").read_text()


def test_device_by_path(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text(H200.replace("NVIDIA H200 SXM", "my card"))
    assert load_device(str(tmp_path / "mine.yaml")).name == "my card"


@pytest.mark.parametrize("name", ["1.10", "4090", "1e3", "on"])
def test_name_of_a_device_stays_as_written(name: str):
    assert device_from_text(H200.replace("NVIDIA H200 SXM", name), "my.yaml").name == name


def test_unknown_name_offers_the_nearest():
    with pytest.raises(ValueError, match="did you mean h200"):
        load_device("h20")


def test_device_without_a_peak_for_the_dtype_says_what_it_has():
    device = device_from_text(H200.replace("  bf16: 989e12", "  # none:"), "my.yaml")
    with pytest.raises(ValueError, match=r"NVIDIA H200 SXM has no peak_flops for bf16 \(it has fp32\).*dtype=fp32"):
        device.peak("bf16")


@pytest.mark.parametrize(
    ("line", "changed", "message"),
    [
        ("memory: 141e9 ", "memory: -1 ", "memory is -1; it must be above 0"),
        ("memory: 141e9 ", "memory: much ", "memory must be a number, got 'much'"),
        ("memory: 141e9 ", "memory: .inf ", "memory is inf; it must be a finite number"),
        ("memory: 141e9 ", "memory: .nan ", "memory is nan; it must be a finite number"),
        ("devices_per_node: 8 ", "devices_per_node: 7.5 ", "devices_per_node is 7.5; it must be a whole number"),
        ("reserved_memory", "reserved_memery", "misses reserved_memory"),
        ("  matmul: 0.75", "  matmul: 75", "at most 1"),
        ("  latency: 5e-6", "  delay: 5e-6", "misses latency"),
    ],
)
def test_bad_description_is_named(line: str, changed: str, message: str):
    with pytest.raises(ValueError, match=message):
        device_from_text(H200.replace(line, changed, 1), "my.yaml")
