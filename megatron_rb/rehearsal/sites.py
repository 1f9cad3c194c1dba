"""Where in the source something happens: the nearest lines of this package and of megatron-core."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from types import CodeType, FrameType

import torch

PACKAGE = f"{Path(__file__).parent.parent}/"
CORE = "/megatron/core/"
OWN = "rehearsal/"
"""The lines of the rehearsal itself are not named."""
DEPTH = 2
"""Lines that a site names: the nearest one and the one that called it."""


def site() -> str:
    """The nearest lines, as `models/stage.py:120 forward < train/step.py:60 train_pass`.

    In the backward pass of torch's own operators, which has no line, the name of the autograd node.
    """
    lines: list[str] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and len(lines) < DEPTH:
        name = short_name(frame.f_code)
        if name:
            lines.append(f"{name}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    node = torch._C._current_autograd_node()
    if node is not None and not lines:
        return f"backward: {node.name()}"
    return " < ".join(lines)


@cache
def short_name(code: CodeType) -> str:
    """The file of a function relative to its package; empty for files that are not named."""
    file = code.co_filename
    at = file.rfind(CORE)
    if at >= 0:
        return CORE[1:] + file[at + len(CORE) :]
    if not file.startswith(PACKAGE):
        return ""
    inside = file.removeprefix(PACKAGE)
    return "" if inside.startswith(OWN) else inside
