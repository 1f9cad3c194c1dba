"""Lets a process import packages that are stood in for, and lets it find none of those that are not asked for."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module, metadata
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from os import PathLike
from types import ModuleType
from typing import Any

from packaging.utils import canonicalize_name

from megatron_rb.rehearsal.packages.catalogue import BY_NAME, known_distributions, known_roots, modules_of
from megatron_rb.rehearsal.stand_ins import StandIns


def stand_in_for_packages(stand_ins: StandIns, asked: Mapping[str, str]) -> None:
    """Let imports and versions answer as where these releases are installed, and none of the others.

    What has imported them already keeps what it found, so a process rehearses one choice of packages.

    Args:
        asked: release by name, as `packages_asked`.
    """
    finder, found = StandInFinder(asked), metadata.distributions

    def distributions(**context: Any) -> Iterable[metadata.Distribution]:
        own = set(finder.find_distributions(metadata.DistributionFinder.Context(**context)))
        real = [each for each in found(**context) if each not in own and not _is_known(each)]
        return [*own, *real]

    _forget(known_roots())
    stand_ins.later(lambda: _forget(known_roots()))
    sys.meta_path.insert(0, finder)
    stand_ins.later(lambda: sys.meta_path.remove(finder))
    stand_ins.set(metadata, "distributions", distributions)


class StandInFinder(MetaPathFinder, Loader):
    """Makes the modules of packages that are stood in for."""

    def __init__(self, asked: Mapping[str, str]) -> None:
        self._modules = modules_of(asked)
        # As those packages say it that are folders; flash_attn_interface does not.
        self._versions_of_roots = {name: asked[name] for name in ("flash_attn", "transformer_engine") if name in asked}
        self._versions = {BY_NAME[name].distribution: release for name, release in asked.items()}

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] not in known_roots():
            return None
        if name not in self._modules:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        source = self._modules[name]
        # A folder with nothing in it has neither loader nor origin.
        spec = ModuleSpec(name, self if source else None, origin=f"rehearsed by {source}" if source else None)
        if any(other.startswith(f"{name}.") for other in self._modules):
            spec.submodule_search_locations = []
        return spec

    def exec_module(self, module: ModuleType) -> None:
        source = import_module(self._modules[module.__name__])
        for name in source.__all__:
            setattr(module, name, getattr(source, name))
        version = self._versions_of_roots.get(module.__name__)
        if version is not None:
            module.__version__ = version  # type: ignore[attr-defined]
        for child in self._modules:
            if child.rpartition(".")[0] == module.__name__:
                import_module(child)

    def find_distributions(self, context: Any = None) -> Iterator[metadata.Distribution]:  # type: ignore[override]
        name = getattr(context, "name", None)
        for distribution, version in self._versions.items():
            if name is None or canonicalize_name(name) == distribution:
                yield StandInDistribution(distribution, version)


class StandInDistribution(metadata.Distribution):
    """What is known of an installed package."""

    def __init__(self, name: str, version: str) -> None:
        self._text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"

    def read_text(self, filename: str) -> str | None:
        return self._text if filename == "METADATA" else None

    def locate_file(self, path: str | PathLike[str]) -> Any:
        raise FileNotFoundError(f"{path} is a file of a package that is stood in for")


def _is_known(distribution: metadata.Distribution) -> bool:
    name = distribution.metadata["Name"]
    return name is not None and canonicalize_name(name) in known_distributions()


def _forget(roots: frozenset[str]) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in roots]:
        del sys.modules[name]
