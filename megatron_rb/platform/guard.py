"""The library that lets a CPU build of torch hold CUDA tensors without storage; compiled once per torch, cached."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")
COMPILERS = ("c++", "g++", "clang++")
STANDARDS = ("c++20", "c++17")
"""Of the headers of torch: 2.13 needs the first."""
CACHE_FOLDER = "megatron-rb"
OUTSIDE = "-DREHEARSED_PRIVATEUSE1"
"""The device is that of a vendor outside of torch."""


def guard_library(device_type: str = "cuda") -> Path:
    """The compiled library; the first call for a torch compiles it, which takes some seconds.

    Args:
        device_type: `cuda`, or that of a vendor outside of torch.

    Raises:
        ValueError: there is no C++ compiler, or it cannot compile against this torch.
    """
    source = SOURCE.read_bytes()
    flags = [] if device_type == "cuda" else [OUTSIDE]
    digest = hashlib.sha256(source + " ".join([metadata.version("torch"), *flags]).encode()).hexdigest()[:16]
    library = cache_folder() / f"guard-{digest}.so"
    if not library.is_file():
        _compile(library, flags)
    return library


def cache_folder() -> Path:
    """Where this package keeps what it can make again."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / CACHE_FOLDER


def _compile(library: Path, flags: Sequence[str]) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    compiler = _compiler()
    errors = ""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        for standard in STANDARDS:
            done = subprocess.run([*_command(compiler, standard, made), *flags], capture_output=True, text=True)
            if done.returncode == 0:
                made.replace(library)  # whole or not at all, also when two processes compile at once
                return
            errors = errors or done.stderr
    first = next((line for line in errors.splitlines() if "error" in line), errors.strip()[:200])
    raise ValueError(
        f"{compiler} cannot compile {SOURCE.name} against torch {metadata.version('torch')} ({first}); name another "
        f"compiler in CXX"
    )


def _compiler() -> str:
    named = os.environ.get("CXX", "")
    found = next((path for name in ([named] if named else COMPILERS) if (path := shutil.which(name))), None)
    if found is None:
        raise ValueError(
            f"a rehearsal needs a C++ compiler once, to build a library of 80 lines for this torch, and there is "
            f"{f'no {named}' if named else 'none of ' + ', '.join(COMPILERS)}; install one (apt-get install g++), or "
            f"name one in CXX"
        )
    return found


def _command(compiler: str, standard: str, library: Path) -> list[str]:
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch = Path(spec.origin).parent
    include, lib = torch / "include", torch / "lib"
    return [
        compiler,
        *("-shared", "-fPIC", "-O1", f"-std={standard}", f"-I{include}", str(SOURCE), "-o", str(library)),
        *(f"-L{lib}", f"-Wl,-rpath,{lib}", "-Wl,--no-as-needed", "-ltorch_cpu", "-lc10"),
    ]
