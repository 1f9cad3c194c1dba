"""Packages of a cluster that a rehearsal can stand in for, and in which releases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

ROOM = "megatron_rb.rehearsal.packages"
NONE = "none"


@dataclass(frozen=True)
class Package:
    """A package that is stood in for."""

    name: str
    """What `--with` calls it: as `kernels.varlen_attention` and `model.layers` do."""
    distribution: str
    """Its name where packages are published."""
    releases: tuple[str, ...]
    """Whose signatures the stand-in has; the last is taken where none is named."""
    modules: Mapping[str, str]
    """Module of the package: that of this room whose `__all__` it has; empty = a folder with nothing in it."""
    approximations: tuple[str, ...]
    """What the stand-in does not do as the package does."""

    def release(self, asked: str) -> str:
        """The release that is meant; empty = the last.

        Raises:
            ValueError: there is no stand-in for it.
        """
        if not asked:
            return self.releases[-1]
        found = next((release for release in self.releases if _same(release, asked)), None)
        if found is None:
            raise ValueError(
                f"{self.name} {asked} cannot be stood in for, only {', '.join(self.releases)}; "
                f"rehearse --with {self.name}={self.releases[-1]}, or --with {NONE}"
            )
        return found


_KERNEL = "results are not computed; how a kernel is compiled and how fast it is are not known"

_OTHER = f"{ROOM}.te_other"
_TRANSFORMER_ENGINE = {
    "transformer_engine": f"{ROOM}.te_base",
    "transformer_engine.common": f"{ROOM}.te_base",
    "transformer_engine.common.recipe": _OTHER,
    "transformer_engine.pytorch": _OTHER,
    "transformer_engine.pytorch.attention": f"{ROOM}.te_attention",
    "transformer_engine.pytorch.distributed": _OTHER,
    "transformer_engine.pytorch.fp8": _OTHER,
    "transformer_engine.pytorch.ops": _OTHER,
    "transformer_engine.pytorch.optimizers": f"{ROOM}.te_optimizers",
    "transformer_engine.pytorch.router": _OTHER,
    "transformer_engine.pytorch.tensor": _OTHER,
    "transformer_engine_torch": f"{ROOM}.te_optimizers",
}

PACKAGES = (
    Package(
        "flash_attn",
        "flash-attn",
        ("2.8.0", "2.8.1", "2.8.2", "2.8.3"),
        {"flash_attn": f"{ROOM}.flash_attn_2", "flash_attn.flash_attn_interface": f"{ROOM}.flash_attn_2"},
        (_KERNEL,),
    ),
    Package(
        "flash_attn_3",
        "flash-attn-3",
        ("3.0.0b1",),
        {"flash_attn_interface": f"{ROOM}.flash_attn_3"},
        (_KERNEL,),
    ),
    Package(
        "flash_attn_4",
        "flash-attn-4",
        ("4.0.0b27",),
        {"flash_attn": "", "flash_attn.cute": f"{ROOM}.flash_attn_4"},
        (_KERNEL, "indices of tiles, of some kilobytes, are not allocated"),
    ),
    Package(
        "transformer_engine",
        "transformer-engine",
        ("2.9.0",),
        _TRANSFORMER_ENGINE,
        (
            _KERNEL,
            "attention from Hopper on is that of cuDNN, whose workspaces are not counted; it is "
            "taken to be 9.6 or newer",
            "the workspace of its products (32 MiB on Hopper) and partial sums of its norms are not allocated",
            "FP8, MoE, fused rotations and losses, and overlapped communication are not there",
        ),
    ),
)
BY_NAME: Mapping[str, Package] = {package.name: package for package in PACKAGES}


def packages_asked(text: str) -> dict[str, str]:
    """Release by name, of `flash_attn=2.8.3,flash_attn_4`; empty = those that are installed here, `none` = none.

    Raises:
        ValueError: a package or its release cannot be stood in for, or is named twice.
    """
    if not text:
        return _installed()
    asked: dict[str, str] = {}
    for word in text.split(",") if text != NONE else ():
        name, _, release = (part.strip() for part in word.partition("="))
        if name not in BY_NAME:
            raise ValueError(
                f"--with names '{name}'; there are stand-ins for {', '.join(BY_NAME)}, written as "
                f"--with flash_attn={BY_NAME['flash_attn'].releases[-1]}"
            )
        if name in asked:
            raise ValueError(f"--with names {name} twice; name one release of it")
        asked[name] = BY_NAME[name].release(release)
    return asked


def _installed() -> dict[str, str]:
    """What is installed here cannot run without its device, so it is stood in for."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        for distribution in metadata.distributions(name=package.distribution):
            found[package.name] = package.release(distribution.version.partition("+")[0])
    return found


def _same(release: str, asked: str) -> bool:
    """Whether 2.9 is 2.9.0; what is no release is none of them."""
    try:
        return Version(release) == Version(asked)
    except InvalidVersion:
        return False


def modules_of(asked: Mapping[str, str]) -> dict[str, str]:
    """The modules of all these packages; one with something in it comes before a mere folder of the same name."""
    modules: dict[str, str] = {}
    for name in asked:
        for module, source in BY_NAME[name].modules.items():
            modules[module] = source or modules.get(module, "")
    return modules


def known_roots() -> frozenset[str]:
    """The first names of all modules that can be stood in for."""
    return frozenset(module.partition(".")[0] for package in PACKAGES for module in package.modules)


def known_distributions() -> frozenset[str]:
    """Names of all distributions that can be stood in for, normalised."""
    return frozenset(canonicalize_name(package.distribution) for package in PACKAGES)
