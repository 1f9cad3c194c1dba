"""Does this stack compute what transformers computes? Two traces of the same samples set against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_rb.checkpoint.hf.oracle import Trace

LOGITS_TOLERANCE = 1e-4
"""Largest absolute difference of a logit, fp32."""
GRADIENT_TOLERANCE = 1e-3
"""Largest difference of a gradient relative to the largest value of its parameter."""


def merge_traces(parts: Sequence[dict[str, torch.Tensor]]) -> Trace:
    """Put the parts of all ranks together into one trace."""
    merged: dict[str, torch.Tensor] = {}
    for part in parts:
        merged |= part
    packs = sorted({key.split("/")[0] for key in merged if key[0].isdigit()})
    names = sorted({key.split("/", 2)[2] for key in merged if "/block/" in key}, key=_pipeline_order)
    return Trace(
        blocks={name: torch.cat([merged[f"{pack}/block/{name}"] for pack in packs]) for name in names},
        logits=torch.cat([merged[f"{pack}/logits"] for pack in packs]),
        loss=float(merged["loss"]),
        gradients={key.removeprefix("grad/"): value for key, value in merged.items() if key.startswith("grad/")},
    )


def _pipeline_order(name: str) -> tuple[int, int]:
    order = ["vision.layers", "vision.deepstack", "vision.merger", "language.layers"]
    prefix, _, number = name.rpartition(".")
    return (order.index(name), 0) if name in order else (order.index(prefix), int(number))


@dataclass(frozen=True)
class Difference:
    """One compared quantity."""

    name: str
    max_abs: float
    relative: float
    """`max_abs` over the largest absolute value of the reference."""
    passed: bool | None
    """None for block outputs, which have no tolerance of their own."""


def compare(ours: Trace, reference: Trace) -> list[Difference]:
    """Blocks in pipeline order, then logits, loss and gradients.

    A gradient is measured against the largest value of its parameter, and no finer than a millionth of the largest
    gradient of the model: below that both sides hold rounding noise.
    """
    rows = [_difference(f"block {name}", ours.blocks[name], reference.blocks[name]) for name in reference.blocks]
    assert ours.logits is not None and reference.logits is not None
    logits = _difference("logits", ours.logits, reference.logits)
    rows.append(Difference(logits.name, logits.max_abs, logits.relative, logits.max_abs <= LOGITS_TOLERANCE))
    gap = abs(ours.loss - reference.loss)
    rows.append(Difference("loss", gap, gap / max(abs(reference.loss), 1e-12), gap <= LOGITS_TOLERANCE))
    if reference.gradients:
        floor = 1e-6 * max(float(g.abs().max()) for g in reference.gradients.values())
        for name, gradient in reference.gradients.items():
            if name not in ours.gradients:
                rows.append(Difference(f"gradient {name}", float("inf"), float("inf"), False))
                continue
            row = _difference(f"gradient {name}", ours.gradients[name], gradient, floor)
            rows.append(Difference(row.name, row.max_abs, row.relative, row.relative <= GRADIENT_TOLERANCE))
    return rows


def _difference(name: str, ours: torch.Tensor, reference: torch.Tensor, floor: float = 1e-12) -> Difference:
    if ours.shape != reference.shape:
        return Difference(f"{name} {tuple(ours.shape)} vs {tuple(reference.shape)}", float("inf"), float("inf"), False)
    if reference.numel() == 0:
        return Difference(name, 0.0, 0.0, None)
    gap = float((ours.double() - reference.double()).abs().max())
    if gap != gap:
        gap = float("inf")
    return Difference(name, gap, gap / max(float(reference.abs().max()), floor), None)


def first_parting(rows: Sequence[Difference]) -> Difference | None:
    """The first block whose relative difference leaves the level of rounding, to tell where to look."""
    return next((row for row in rows if row.name.startswith("block ") and row.relative > LOGITS_TOLERANCE), None)


def load_rank_traces(folder: str | Path, world_size: int) -> list[dict[str, torch.Tensor]]:
    """The files `rank0.safetensors` ... that the ranks of a parity run wrote."""
    from safetensors.torch import load_file

    return [load_file(Path(folder) / f"rank{rank}.safetensors") for rank in range(world_size)]
