"""Description of a device and its links: peak rates, memory, bandwidths, efficiency; one yaml file each."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from megatron_rb.config.written import load_yaml, value_of

CONF_MODULE = "megatron_rb.conf"
SLOWER_FORMS = {"PCIE", "NVL"}
"""Words in the names of devices that share a number with a faster one; their data sheets say less."""


@dataclass(frozen=True)
class Link:
    """One kind of connection between devices."""

    bandwidth: float
    """Bytes per second of a device in one direction."""
    latency: float
    """Seconds."""


@dataclass(frozen=True)
class Efficiency:
    """How much of its peak a device reaches: curves with two parameters each."""

    matmul: float
    """Share of the peak that large matrix products reach."""
    matmul_half: float
    """FLOPs of a product that reaches half of it."""
    attention: float
    """Share of the peak that attention over long sequences reaches."""
    attention_half: float
    """Attended tokens at which it reaches half of it."""
    memory: float
    """Share of the memory bandwidth."""
    link: float
    """Share of a link's bandwidth."""
    operator_seconds: float
    """Time an operator costs beside its work."""


@dataclass(frozen=True)
class Device:
    """One device, as a rank has it."""

    name: str
    peak_flops: dict[str, float]
    """Dense FLOP/s by dtype."""
    memory: float
    """Bytes."""
    memory_bandwidth: float
    """Bytes per second."""
    devices_per_node: int
    inside_node: Link
    between_nodes: Link
    efficiency: Efficiency
    reserved_memory: float
    """Bytes that context and libraries take."""
    platform: str = "cuda"
    """Whose kernels run on it, as `platform.name`."""

    def peak(self, dtype: str) -> float:
        """FLOP/s of a dtype.

        Raises:
            ValueError: the description has no figure for it.
        """
        if dtype not in self.peak_flops:
            known = ", ".join(self.peak_flops) or "none"
            raise ValueError(
                f"the device {self.name} has no peak_flops for {dtype} (it has {known}); add the figure to its yaml "
                f"file, or plan with dtype={next(iter(self.peak_flops), 'fp32')}"
            )
        return self.peak_flops[dtype]


def device_names() -> list[str]:
    """Devices that are shipped."""
    folder = resources.files(CONF_MODULE) / "device"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def load_device(name: str) -> Device:
    """A shipped device by name, or any other by the path of its yaml file.

    Raises:
        ValueError: there is no such device, or its description is incomplete.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"there is no device file {path}")
        return device_from_text(path.read_text(), str(path))
    if name not in device_names():
        close = difflib.get_close_matches(name, device_names(), n=1)
        hint = f"; did you mean {close[0]}?" if close else ";"
        raise ValueError(
            f"there is no device '{name}'{hint} there are {', '.join(device_names())}, and any file NAME.yaml"
        )
    return device_from_text((resources.files(CONF_MODULE) / "device" / f"{name}.yaml").read_text(), f"device {name}")


def device_from_text(text: str, origin: str) -> Device:
    """Read a description; every figure must be there, be a number and make sense."""
    try:
        tree = value_of(load_yaml(text), Device)
    except yaml.YAMLError as error:
        raise ValueError(f"{origin} is not valid YAML: {' '.join(str(error).split())}") from error
    except ValueError as error:
        raise ValueError(f"{origin}: name {error}") from error
    tree = _section(tree, Device, origin)
    peaks = tree["peak_flops"] or {}
    if not isinstance(peaks, dict):
        raise ValueError(f"{origin}: peak_flops must map dtypes to FLOP/s")
    device = Device(
        name=tree["name"],
        peak_flops={str(dtype): _number(value, f"peak_flops.{dtype}", origin) for dtype, value in peaks.items()},
        memory=_number(tree["memory"], "memory", origin),
        memory_bandwidth=_number(tree["memory_bandwidth"], "memory_bandwidth", origin),
        devices_per_node=_whole(tree["devices_per_node"], "devices_per_node", origin),
        inside_node=Link(**_numbers(tree["inside_node"], Link, f"{origin}, inside_node")),
        between_nodes=Link(**_numbers(tree["between_nodes"], Link, f"{origin}, between_nodes")),
        efficiency=Efficiency(**_numbers(tree["efficiency"], Efficiency, f"{origin}, efficiency")),
        reserved_memory=_number(tree["reserved_memory"], "reserved_memory", origin, least=0.0),
        platform=str(tree.get("platform", Device.platform)),
    )
    for name in ("matmul", "attention", "memory", "link"):
        share = getattr(device.efficiency, name)
        if share > 1:
            raise ValueError(f"{origin}: efficiency.{name} is {share}; it is a share of the peak, at most 1")
    return device


def with_memory(device: Device, memory: float) -> Device:
    """The same device with another memory limit in bytes."""
    return dataclasses.replace(device, memory=memory)


def beyond(device: Device, memory: float) -> str:
    """What to say of a limit in bytes that is above what a device has; empty when it is not."""
    if memory <= device.memory:
        return ""
    return f"planned for {memory / 1e9:g} GB of memory, {device.name} has {device.memory / 1e9:g} GB"


def _section(tree: Any, kind: type, origin: str) -> dict[str, Any]:
    names = [item.name for item in fields(kind)]
    optional = [item.name for item in fields(kind) if item.default is not dataclasses.MISSING]
    if not isinstance(tree, dict):
        raise ValueError(f"{origin} must hold {', '.join(names)}")
    missing = [name for name in names if name not in tree and name not in optional]
    strange = [name for name in tree if name not in names]
    if missing or strange:
        what = f"misses {missing[0]}" if missing else f"has the unknown entry {strange[0]}"
        raise ValueError(f"{origin} {what}; it holds {', '.join(names)}")
    return tree


def _numbers(tree: Any, kind: type, origin: str) -> dict[str, float]:
    least = 0.0  # halves and latencies may be zero, rates may not
    section = _section(tree, kind, origin)
    rates = ("bandwidth", "matmul", "attention", "memory", "link")
    return {
        name: _number(value, name, origin, least=None if name in rates else least) for name, value in section.items()
    }


def _number(value: Any, name: str, origin: str, least: float | None = None) -> float:
    try:
        number = float(value)  # YAML 1.1 reads 989e12 as a text
    except (TypeError, ValueError) as error:
        raise ValueError(f"{origin}: {name} must be a number, got {value!r}") from error
    if not math.isfinite(number):
        raise ValueError(f"{origin}: {name} is {number}; it must be a finite number")
    if number <= 0 if least is None else number < least:
        raise ValueError(f"{origin}: {name} is {number:g}; it must be {'above' if least is None else 'at least'} 0")
    return number


def _whole(value: Any, name: str, origin: str) -> int:
    number = _number(value, name, origin)
    if number != int(number):
        raise ValueError(f"{origin}: {name} is {number:g}; it must be a whole number")
    return int(number)


@dataclass(frozen=True)
class Peak:
    """What model FLOPs utilization is a share of."""

    flops: float
    """Per second and device."""
    source: str


def published_peak(device: str, dtype: str) -> Peak | None:
    """The peak of a device by the name its runtime gives it; None when no shipped description is of it."""
    name = shipped_device(device)
    known = load_device(name) if name else None
    if known is None or dtype not in known.peak_flops:
        return None
    return Peak(known.peak(dtype), f"{known.name}, {dtype}, from conf/device/{name}.yaml")


def shipped_device(device: str) -> str:
    """Name of the shipped description of a device, by the name its runtime gives it; empty = there is none."""
    words = set(re.split(r"[\W_]+", device.upper()))
    numbers = {name: name.split("_")[-1].upper() for name in device_names()}
    found = (name for name, number in numbers.items() if number in words and number != "CPU")
    return "" if words & SLOWER_FORMS else next(found, "")
