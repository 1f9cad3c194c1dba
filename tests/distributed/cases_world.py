"""Cases for test_world: what a rank sees, and ranks that fail, hang or leave something behind."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy
import torch

import megatron_rb.platform


def about() -> dict[str, Any]:
    """What a rank is and has."""
    return {
        "rank": os.environ["RANK"],
        "threads": [torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]],
        "session": os.getsid(0) == os.getpid(),
        "parent": os.getppid(),
        "folder": os.getcwd(),
        "hash": hash("a string"),
        "files": open_files(),
        "drawn": [random.random(), numpy.random.rand()],
        "core": "megatron.core" in sys.modules,
        "variable": os.environ.get("A_VARIABLE_OF_THE_TEST"),
        "mark": getattr(megatron_rb.platform, "mark", None),
    }


def open_files() -> list[str]:
    """What is open beside the standard streams."""
    names = []
    for file in sorted(os.listdir("/proc/self/fd"))[3:]:
        with contextlib.suppress(FileNotFoundError):  # of the listing itself
            names.append(os.readlink(f"/proc/self/fd/{file}"))
    return names


def change_the_package() -> None:
    """What must stay in this world."""
    megatron_rb.platform.mark = "changed"  # type: ignore[attr-defined]


def fail_on_rank_one() -> None:
    print(f"rank {os.environ['RANK']} was here", flush=True)
    if os.environ["RANK"] == "1":
        raise ValueError("rank one does not like it")
    time.sleep(60)


def kill_the_server() -> None:
    if os.environ["RANK"] == "0":
        os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


def hang_with_a_child(folder: str) -> None:
    child = subprocess.Popen(["sleep", "60"])
    Path(folder, f"child{os.environ['RANK']}").write_text(str(child.pid))
    time.sleep(60)
