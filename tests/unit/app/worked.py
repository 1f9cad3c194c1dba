"""What the worker processes of the tests do."""

from __future__ import annotations

import json
import time
from pathlib import Path
from threading import Thread

import torch.distributed as dist

from megatron_rb.config.failures import NotFinite
from megatron_rb.config.schema import Config
from megatron_rb.layout import parse_layout
from megatron_rb.parallel.session import Session


def describe(session: Session, config: Config, folder: Path) -> None:
    """Write where this rank stands."""
    mesh = session.mesh
    found = {"name": mesh.name, "layout": str(session.layout), "tp": dist.get_process_group_ranks(mesh.tp_group)}
    (folder / f"rank{mesh.rank}.json").write_text(json.dumps(found | {"run": config.name}))


def wrong_on_rank_zero(session: Session, config: Config, folder: Path) -> None:
    """Rank 0 finds wrong input while a thread of it waits for the other rank, which is busy."""
    if session.mesh.rank == 0:
        Thread(target=dist.barrier).start()
        wrong(folder)
    time.sleep(300)


def wrong(folder: Path) -> None:
    """As any function of the package says that input is wrong."""
    parse_layout("P v | nonsense", 1, 1, 2)


def not_finite(folder: Path) -> None:
    raise NotFinite("the loss is NaN")


def broken(folder: Path) -> None:
    raise ValueError("nobody has foreseen this")
