"""Compiles the Triton kernels that a rehearsal would start for the rehearsed device; needs no GPU and no driver."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from megatron_rb.rehearsal.launches import Launch

COMPILER_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion")
WARP = 32
FIRST_WORDS = 300
"""Characters of a compiler's complaint that are kept."""


def failures(launches: Iterable[Launch], architecture: int, shared: Path) -> list[str]:
    """What does not compile for compute capability `architecture / 10`, in lines; nothing without Triton.

    Args:
        shared: folder in which processes tell each other what they compile, so that each is compiled once.
    """
    lines = []
    for launch in {_signature(launch): launch for launch in launches}.values():
        if not _taken(launch, shared):
            continue
        try:
            compile_launch(launch, architecture)
        except Exception as error:  # whatever a compiler may say
            words = " ".join(str(error).split())[:FIRST_WORDS] or type(error).__name__
            lines.append(f"{launch.kernel} started at {launch.site} does not compile for sm_{architecture}: {words}")
    return lines


def compile_launch(launch: Launch, architecture: int) -> Any:
    """The compiled kernel."""
    import triton  # optional; what was recorded says that it is there
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = launch.kernel.partition(":")
    function = getattr(import_module(module), name)
    while not isinstance(function, triton.JITFunction):  # autotuners and heuristics around it
        function = function.fn
    names = [name for name, _ in launch.arguments]
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned}
    source = ASTSource(function, dict(launch.arguments), dict(launch.constants), aligned)
    options = {key: value for key, value in launch.options if key in COMPILER_OPTIONS and value is not None}
    return triton.compile(source, target=GPUTarget("cuda", architecture, WARP), options=options)


def _signature(launch: Launch) -> str:
    """What makes a kernel another one for the compiler."""
    parts = (launch.kernel, launch.arguments, launch.constants, launch.aligned, launch.options)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _taken(launch: Launch, shared: Path) -> bool:
    """Whether this process is the first that wants to compile it."""
    try:
        (shared / _signature(launch)).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
