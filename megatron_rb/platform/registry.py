"""Finds the platform of a process: an explicit name, the environment, the one accelerator present, else cpu."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from importlib.metadata import EntryPoint, entry_points

from megatron_rb.platform.base import Platform
from megatron_rb.platform.cpu import CpuPlatform
from megatron_rb.platform.cuda import CudaPlatform
from megatron_rb.platform.musa import MusaPlatform
from megatron_rb.platform.rehearsal import MusaRehearsalPlatform, RehearsalPlatform

ENTRY_POINT_GROUP = "megatron_rb.platforms"
ENVIRONMENT_VARIABLE = "MEGATRON_RB_PLATFORM"
BUILT_IN: Mapping[str, type[Platform]] = {
    "cpu": CpuPlatform,
    "cuda": CudaPlatform,
    "musa": MusaPlatform,
}
STAND_INS: Mapping[str, type[Platform]] = {
    RehearsalPlatform.name: RehearsalPlatform,
    MusaRehearsalPlatform.name: MusaRehearsalPlatform,
}
"""No device is behind these: who needs one asks for it by name."""

_override: ContextVar[Platform | None] = ContextVar("platform_override", default=None)


def get_platform(name: str = "auto") -> Platform:
    """The platform `name`; `auto` asks MEGATRON_RB_PLATFORM, then probes the accelerators, then takes cpu.

    The answer is cached per process. Inside `use_platform` it is the given platform.
    """
    override = _override.get()
    if override is not None:
        return override
    if name == "auto":
        name = os.environ.get(ENVIRONMENT_VARIABLE, "") or "auto"
    return _probe_platform() if name == "auto" else _load_platform(name)


def available_platforms() -> list[str]:
    """Names of the built-in and the registered platforms, whether their device is present or not."""
    return sorted(_factories())


@contextmanager
def use_platform(platform: Platform) -> Iterator[Platform]:
    """Make `get_platform` return `platform` inside the block (for tests)."""
    token = _override.set(platform)
    try:
        yield platform
    finally:
        _override.reset(token)


@cache
def _load_platform(name: str) -> Platform:
    factories: dict[str, Callable[[], Platform]] = {**_factories(), **STAND_INS}
    if name not in factories:
        raise ValueError(f"unknown platform {name!r}; known are {', '.join(available_platforms())} and auto")
    platform = factories[name]()
    if platform.name != name:
        raise ValueError(f"platform {name} is registered, but it calls itself {platform.name}; use one name for both")
    probe = platform.probe()
    if not probe.available:
        raise ValueError(f"platform {name} cannot be used here: {probe.reason}")
    return platform


@cache
def _probe_platform() -> Platform:
    present = {}
    for name, factory in _factories().items():
        if name == "cpu":
            continue
        probe = factory().probe()
        if probe.available:
            present[name] = probe.reason
    if len(present) > 1:
        found = ", ".join(f"{name} ({reason})" for name, reason in present.items())
        raise ValueError(
            f"several accelerators are present: {found}; choose one with platform.name=<name> or {ENVIRONMENT_VARIABLE}"
        )
    return _load_platform(next(iter(present), "cpu"))


def _factories() -> dict[str, Callable[[], Platform]]:
    factories: dict[str, Callable[[], Platform]] = dict(BUILT_IN)
    plugins: dict[str, EntryPoint] = {}
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        name = entry_point.name
        if name in BUILT_IN:
            own = f"{BUILT_IN[name].__module__}:{BUILT_IN[name].__name__}"
            if entry_point.value != own:
                raise ValueError(f"plug-in {entry_point.value} takes the built-in platform name {name!r}; rename it")
            continue
        if name in plugins and plugins[name].value != entry_point.value:
            raise ValueError(f"platform {name} is registered by {plugins[name].value} and by {entry_point.value}")
        plugins[name] = entry_point
        factories[name] = partial(_load_plugin, entry_point)
    return factories


def _load_plugin(entry_point: EntryPoint) -> Platform:
    try:
        platform = entry_point.load()()
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(
            f"platform {entry_point.name} cannot be loaded from {entry_point.value}: {error}; repair or uninstall it"
        ) from error
    if not isinstance(platform, Platform):
        raise ValueError(f"platform {entry_point.name}: {entry_point.value} is no megatron_rb.platform.Platform")
    return platform
