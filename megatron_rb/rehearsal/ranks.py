"""Which ranks of a run stand for all of them."""

from __future__ import annotations

from dataclasses import replace

from megatron_rb.layout.mesh import RankGrid


def ranks_asked(text: str, grid: RankGrid) -> list[int]:
    """`all`, `classes`, or numbers such as `0,256` and `0-7`.

    Raises:
        ValueError: it is none of these, or a number is no rank of the run.
    """
    if text == "all":
        return list(range(grid.world_size))
    if text == "classes":
        return classes(grid)
    try:
        asked = [_range(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--ranks '{text}' is not understood; write all, classes, or numbers as 0,8-15") from error
    over = [part[-1] for part in asked if part[-1] >= grid.world_size]
    if over:
        raise ValueError(f"--ranks names rank {over[0]}; the run has the ranks 0 to {grid.world_size - 1}")
    return sorted({rank for part in asked for rank in part})


def classes(grid: RankGrid) -> list[int]:
    """For every pipeline, tensor- and context-parallel coordinate the ranks of the first and last copy of the model.

    Copies have other samples, whose micro-batches are padded alike, and nothing else that differs.
    """
    first = [rank for rank in range(grid.world_size) if grid.coordinates(rank).dp == 0]
    last = [grid.rank(replace(grid.coordinates(rank), dp=grid.dp_size - 1)) for rank in first]
    return sorted({*first, *last})


def _range(part: str) -> range:
    """Of `8` or `8-15`; never empty.

    Raises:
        ValueError: it is neither.
    """
    first, dash, last = part.strip().partition("-")
    ranks = range(int(first), int(last if dash else first) + 1)
    if not ranks:
        raise ValueError(f"{part} goes down")
    return ranks
