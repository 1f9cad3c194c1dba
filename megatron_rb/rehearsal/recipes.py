"""Every recipe rehearsed, one copy of the model and the published world, as a table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megatron_rb.config.compose import group_choices, load_config
from megatron_rb.rehearsal.prepare import Rehearsal, RehearsalRequest, prepare
from megatron_rb.rehearsal.run import rehearse
from megatron_rb.rehearsal.summary import RehearsalSummary, summarise

OF_PUBLISHED = ("robobrain", "finetune_")
"""What the names of recipes of published models begin with."""
GIB = 2**30
HEADER = (
    "| recipe | device | processes | stage | peak GiB | of | headroom | weights | gradients | optimizer | activations "
    "| waits | device operations | sent inside a node, GiB | between nodes |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
)


def recipes() -> list[str]:
    """Names of the recipes of published models."""
    return [name for name in group_choices("experiment") if name.startswith(OF_PUBLISHED)]


def rehearse_recipes(
    names: Sequence[str],
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, all: None,
    *,
    published: bool = True,
    micro_batches: int = 0,
    processes: int = 0,
    python: str = sys.executable,
) -> list[RehearsalSummary]:
    """One rank of every stage of every recipe: of one copy of the model on each of its kinds of device, then of the
    world it was published for on the first of them.

    Args:
        published: False = one copy alone.
        micro_batches: of a step and copy; 0 = so many that every stage holds as many as it ever does.
        processes, python: as `run.rehearse` takes them.
    """
    runs = [
        _prepared(name, world, device, micro_batches, folder)
        for name in names
        for world, device in _worlds(name, published)
    ]
    found = rehearse(runs, folder, processes, progress, python=python)
    return [summarise(run, each) for run, each in zip(runs, found, strict=True)]


def _worlds(name: str, published: bool) -> list[tuple[int, str]]:
    """Processes and device of every rehearsal of a recipe."""
    config = load_config([f"experiment={name}"])
    parallel, recipe = config.parallel, config.recipe
    copy = parallel.tp_size * parallel.pp_size * parallel.cp_size
    more = [recipe.world_size] if published and recipe.world_size > copy else []
    return [(copy, device) for device in recipe.devices] + [(world, recipe.devices[0]) for world in more]


def _prepared(name: str, world_size: int, device: str, micro_batches: int, folder: Path) -> Rehearsal:
    parallel = load_config([f"experiment={name}"]).parallel
    ranks = ",".join(str(stage * world_size // parallel.pp_size) for stage in range(parallel.pp_size))
    words = (f"experiment={name}", f"world_size={world_size}")
    request = RehearsalRequest(
        words, ranks, micro_batches=micro_batches or parallel.pp_size + 1, compiled=False, device=device
    )
    return prepare(request, folder / f"prepared_{name}_{world_size}_{device}")


def table(summaries: Sequence[RehearsalSummary]) -> Iterator[str]:
    """Lines of a markdown table."""
    yield from HEADER
    for summary in summaries:
        for stage in summary.stages:
            kinds = " | ".join(
                f"{stage.kinds[kind] / GIB:.1f}" for kind in ("weights", "gradients", "optimizer", "activations")
            )
            inside, between = (stage.bytes_by_link.get(link, 0) / GIB for link in ("inside a node", "between nodes"))
            yield (
                f"| {summary.name} | {summary.device} | {summary.world_size:,} | {stage.blocks} | "
                f"{stage.peak_bytes / GIB:.1f} | {stage.memory_bytes / GIB:.1f} | {stage.headroom:.0%} | {kinds} | "
                f"{sum(count for _, _, count in stage.waits)} | {stage.operations:,} | {inside:.1f} | {between:.1f} |"
            )


def page(summaries: Sequence[RehearsalSummary]) -> str:
    """The table with what it is of."""
    device = ", ".join(sorted({summary.device for summary in summaries}))
    words = [
        "# Every recipe, rehearsed",
        "",
        "`rb rehearse --recipes DIR` makes this table: the step of one rank of every stage, on tensors without values,",
        "with micro-batches that fill both budgets; one copy of the model, then the published number of processes.",
        f"Memory of: {device}, less what its libraries take (`reserved_memory`). Nothing was measured on a GPU.",
        "",
        *table(summaries),
        "",
    ]
    found = [f"- {summary.name}, {each.kind}: {each.text}" for summary in summaries for each in summary.defects]
    return "\n".join([*words, *(["Defects:", "", *found] if found else ["No defect was found."]), ""])
