"""The library that lets a CPU build of torch hold CUDA tensors without storage; compiled once per torch, cached."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from megatron_rb.config.failures import without_room

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
        ValueError: there is no C++ compiler, it cannot compile against this torch, or nothing can be kept in the cache.
    """
    source = SOURCE.read_bytes()
    flags = [] if device_type == "cuda" else [OUTSIDE]
    # The library finds torch where it was compiled; another environment has one of its own.
    words = [metadata.version("torch"), str(_torch_folder()), platform.machine(), *flags]
    digest = hashlib.sha256(source + " ".join(words).encode()).hexdigest()[:16]
    library = cache_folder() / f"guard-{digest}.so"
    if not library.is_file() or _trouble_of(library):
        _compile(library, flags)
        if trouble := _trouble_of(library):
            raise ValueError(f"{library} was compiled and cannot be loaded ({trouble}); name another compiler in CXX")
    return library


def preloading(library: Path) -> dict[str, str]:
    """Variables of a process that loads the library before anything else.

    Raises:
        ValueError: the loader would take its path for several.
    """
    folder, name, others = str(library.parent), str(library), os.environ.get("LD_PRELOAD", "")
    variables = {}
    if ":" in folder or ";" in folder:
        raise ValueError(f"the loader cannot load {library}: its folder has a : or ; in it; set XDG_CACHE_HOME")
    if any(letter.isspace() for letter in folder):  # it ends a name, but not a folder
        folders = os.environ.get("LD_LIBRARY_PATH", "")
        name, variables["LD_LIBRARY_PATH"] = library.name, f"{folder}:{folders}" if folders else folder
    return variables | {"LD_PRELOAD": f"{name}:{others}" if others else name}


def cache_folder() -> Path:
    """Where this package keeps what it can make again."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / CACHE_FOLDER


def _trouble_of(library: Path) -> str:
    """What the loader says when it cannot load the library; empty when it can."""
    done = subprocess.run(["/bin/true"], env=os.environ | preloading(library), capture_output=True, text=True)
    return next((line for line in done.stderr.splitlines() if library.name in line), "")


def _compile(library: Path, flags: Sequence[str]) -> None:
    compiler = _compiler()
    _make_folder(library.parent)
    errors = ""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        for standard in STANDARDS:
            done = subprocess.run([*_command(compiler, standard, made), *flags], capture_output=True, text=True)
            if done.returncode == 0:
                made.replace(library)  # whole or not at all, also when two processes compile at once
                return
            errors = errors or done.stderr
    first = next((line for line in errors.splitlines() if "error" in line), errors.strip()[:200] or "it says nothing")
    raise ValueError(
        f"{compiler} cannot compile {SOURCE.name} against torch {metadata.version('torch')} ({first}); name another "
        f"compiler in CXX"
    )


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if without_room(error):
            raise
        raise ValueError(
            f"the cache {folder} cannot be made ({error.strerror}); name another place in XDG_CACHE_HOME"
        ) from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"nothing may be made in the cache {folder}; name another place in XDG_CACHE_HOME")


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
    torch = _torch_folder()
    include, lib = torch / "include", torch / "lib"
    return [
        compiler,
        *("-shared", "-fPIC", "-O1", f"-std={standard}", f"-I{include}", str(SOURCE), "-o", str(library)),
        *(f"-L{lib}", f"-Wl,-rpath,{lib}", "-Wl,--no-as-needed", "-ltorch_cpu", "-lc10"),
    ]


def _torch_folder() -> Path:
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent
