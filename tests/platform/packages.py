"""Packages as pip would leave them, for processes that tests start."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_rb.platform.cpu import CpuPlatform

TORCH_BACKENDS = "torch.backends"
"""torch calls what is registered in this group at the end of its own import; torch_musa is loaded by it."""


def install_package(folder: Path, name: str, group: str, entry_points: Mapping[str, str]) -> str:
    """Write the metadata of a package with these entry points; returns the folder, for PYTHONPATH."""
    about = folder / f"{name}-0.1.0.dist-info"
    about.mkdir(parents=True)
    lines = [f"{entry} = {value}" for entry, value in entry_points.items()]
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
    (about / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines]) + "\n")
    return str(folder)


class PresentPlatform(CpuPlatform):
    """A platform that says that its device is there."""

    name = "npu"
