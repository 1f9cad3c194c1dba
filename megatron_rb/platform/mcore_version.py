"""Which releases of megatron-core this stack runs with, and which one an import finds; nothing is imported for it."""

from __future__ import annotations

import re
import runpy
from importlib.util import find_spec
from pathlib import Path

SUPPORTED = ("0.16.1", "0.17", "0.18", "0.19")
"""The first supported release of every minor version; docs/platforms.md says what has run on which."""
ON_THE_INDEX = "0.16.1"
"""What pip can install: the newest release of the package index."""


def found_folder() -> Path | None:
    """The folder of the `megatron.core` that an import takes, which need not be the one pip has installed."""
    try:
        spec = find_spec("megatron.core")
    except ModuleNotFoundError:  # not even another part of `megatron`
        return None
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def found_version() -> str:
    """The version that the folder states of itself; empty = there is no megatron-core."""
    folder = found_folder()
    return "" if folder is None else runpy.run_path(str(folder / "package_info.py"))["__version__"]


def version_fault() -> str:
    """What is wrong with the megatron-core that an import finds, and the way out; empty = it is a supported one."""
    version, way_out = found_version(), f"run `pip install 'megatron-core=={ON_THE_INDEX}'`"
    if not version:
        return f"megatron-core is not installed; {way_out}"
    if not is_supported(version):
        return (
            f"megatron-core {version} of {found_folder()} is not supported; {', '.join(SUPPORTED)} and their later "
            f"patches are: {way_out}, with no other megatron-core on PYTHONPATH"
        )
    return ""


def is_supported(version: str) -> bool:
    """Whether a release, or a patch or candidate of it, is on the list."""
    numbers = _numbers(version)
    return any(numbers[:2] == first[:2] and numbers >= first for first in map(_numbers, SUPPORTED))


def _numbers(version: str) -> tuple[int, int, int]:
    """Major, minor and patch of `0.17`, `0.18.2`, `0.19.0rc1` or `0.19.1+d96d76c`."""
    major, minor, patch = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version).groups(default="0")  # type: ignore[union-attr]
    return int(major), int(minor), int(patch)
