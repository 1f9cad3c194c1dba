"""Opens a checkpoint that fits what a run holds, and fills that from it, each value read once by one rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_rb.checkpoint.optimizer_state import PREFIX
from megatron_rb.checkpoint.runs import (
    TensorRun,
    clear_padding,
    holder_number,
    pieces_of,
    runs_of_rank,
    send_to_all,
    shared_runs,
)
from megatron_rb.checkpoint.stored import Stored, open_stored, read_pieces
from megatron_rb.parallel.collectives import gather_from_all, on_all
from megatron_rb.parallel.mesh import Mesh
from megatron_rb.parallel.sharding import Sharded, global_shape

LISTED_KEYS = 5
"""Keys named in an error before the rest is counted."""


def open_fitting(
    folder: Path, wanted: Mapping[str, Sharded], objects: set[str], ignored: tuple[str, ...], mesh: Mesh
) -> Stored:
    """Open a folder on every rank once all have seen that it holds what they need, and no more.

    Args:
        wanted: the tensors of this rank by key, equal on ranks with the same weights.
        objects: further keys of this rank.
        ignored: beginnings of keys that the folder may hold beyond these.

    Raises:
        ValueError: it does not; the same words on every rank.
    """
    stored = on_all(partial(open_stored, folder))
    told = gather_from_all({*objects, *(wanted if holder_number(mesh) == 0 else ())})
    asked = set().union(*told)
    lacking = asked - stored.keys
    beyond = {key for key in stored.keys - asked if not key.startswith(ignored)}
    if lacking or beyond:
        optimizer_only = all(key.startswith(PREFIX) for key in {*lacking, *beyond})
        way_out = "; set optimizer.name, parallel.distributed_optimizer and model.dtype as in the run that saved it"
        hint = way_out if optimizer_only else ""
        raise ValueError(
            f"{folder} does not fit this run: it lacks {listed(lacking)} and has beyond it {listed(beyond)}; "
            f"nothing was restored{hint}"
        )
    on_all(partial(_check_shapes, stored, wanted))
    return stored


def _check_shapes(stored: Stored, wanted: Mapping[str, Sharded]) -> None:
    for key, sharded in wanted.items():
        there, here = stored.shape(key), tuple(global_shape(sharded))
        if there != here:
            raise ValueError(
                f"{stored.folder} does not fit this run: {key} has the shape {list(there)} there and {list(here)} "
                "here; nothing was restored"
            )


def read_together(
    stored: Stored, shared: Sequence[Sharded], held: Iterable[TensorRun], rng: str | None, mesh: Mesh
) -> dict[str, Any]:
    """Fill tensors, those that ranks share by one of them each; returns the object under the key `rng`."""
    runs = shared_runs(shared, mesh)
    mine = [*runs_of_rank(runs, mesh), *held]

    def read() -> dict[str, Any]:
        for run in mine:
            clear_padding(run)
        read_pieces(stored, (piece for run in mine for piece in pieces_of(run)))
        return stored.object(rng) if rng else {}

    states = on_all(read)
    send_to_all(runs, mesh)
    return states


def listed(keys: Any) -> str:
    """Some of the keys, in words."""
    names = sorted(keys)
    if not names:
        return "nothing"
    more = f" and {len(names) - LISTED_KEYS} more" if len(names) > LISTED_KEYS else ""
    return ", ".join(names[:LISTED_KEYS]) + more
