"""The reference path of the kernels on a CPU: the vision tower beside transformers' own, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from megatron_rb.app.session import session_of
from megatron_rb.bench.step import one_process
from megatron_rb.bench.timing import Times, median_ratio, time_in_turn
from megatron_rb.checkpoint.hf.vision_tower import TransformersTower, write_tower_model
from megatron_rb.data.sample import EncodedSample, VisionGrid
from megatron_rb.layout import parse_layout
from megatron_rb.layout.mesh import RankGrid
from megatron_rb.models.build import ModelOptions
from megatron_rb.models.inputs import IGNORED, build_micro_batch, to_device
from megatron_rb.parallel.session import Session
from megatron_rb.shapes.shape import RoboBrainShape
from megatron_rb.train.build import build_model

IMAGES = {
    "full windows": ((32, 32),),
    "ragged windows": ((34, 46),),
    "four images": ((16, 20), (24, 16), (12, 28), (20, 12)),
}
"""Height and width in patches."""
TOLERANCE = 1e-4
"""Largest relative difference of the summed squares of the outputs."""


@dataclass(frozen=True)
class TowerComparison:
    """One tower on one set of images."""

    family: str
    hidden_size: int
    images: str
    patches: int
    times: dict[str, Times]

    @property
    def speedup(self) -> float:
        """CPU time of transformers / ours, the median over the rounds; above 1 ours is faster."""
        return median_ratio(self.times["transformers"].cpu, self.times["ours"].cpu)


def compare_towers(folder: str | Path, family: str, *, narrow: bool, rounds: int) -> list[TowerComparison]:
    """Time both towers on every set of images, in turn, on a new model in an empty folder.

    Raises:
        RuntimeError: the towers disagree.
    """
    write_tower_model(folder, family, narrow=narrow)
    with session_of(one_process(folder, threads=1)) as session:
        return [_compare(session, folder, name, rounds) for name in IMAGES]


def _compare(session: Session, folder: str | Path, name: str, rounds: int) -> TowerComparison:
    shape = session.shape
    samples = [_sample(shape, IMAGES[name])]
    sides: dict[str, Callable[[], float]] = {
        "ours": OurTower(session, folder, samples),
        "transformers": TransformersTower(folder, samples),
    }
    sums = {side: run() for side, run in sides.items()}  # also the warm-up
    if abs(sums["ours"] - sums["transformers"]) > TOLERANCE * sums["transformers"]:
        raise RuntimeError(f"the towers of {shape.family} differ on {name}, their times say nothing: {sums}")
    times = time_in_turn(sides, rounds)
    return TowerComparison(shape.family, shape.vision.hidden_size, name, samples[0].num_patches, times)


class OurTower:
    """Forward and backward pass of the stage that holds the tower, with all that is made of a batch on the way."""

    def __init__(self, session: Session, folder: str | Path, samples: Sequence[EncodedSample]) -> None:
        shape = session.shape
        vision, text = shape.vision.num_layers, shape.text.num_layers
        layout = parse_layout(f"P v*{vision} M | E t*{text} L", vision, text, 2)
        first = replace(session, mesh=replace(session.mesh, grid=RankGrid(pp_size=2)), layout=layout)
        self.stage = build_model(first, ModelOptions(), str(folder))[0]
        self.shape, self.samples = shape, samples

    def __call__(self) -> float:
        """Half the sum of all squared outputs, of which the gradients are taken."""
        self.stage.zero_grad(set_to_none=True)
        batch = build_micro_batch(self.samples, self.shape, tp_rank=0, tp_size=1, sequence_parallel=False)
        out = self.stage(to_device(batch, self.shape, torch.device("cpu")))
        loss = out.square().sum() / 2
        loss.backward()
        return float(loss.detach())


def _sample(shape: RoboBrainShape, sizes: Sequence[tuple[int, int]]) -> EncodedSample:
    draw = np.random.default_rng(0)
    grids = tuple(VisionGrid(1, height, width, "image") for height, width in sizes)
    tokens = sum(grid.patches for grid in grids) // shape.vision.merge_unit
    ids = np.full(tokens, shape.image_token_id, dtype=np.int32)
    pixels = [draw.standard_normal((grid.patches, shape.vision.patch_dim)).astype(np.float32) for grid in grids]
    return EncodedSample("drawn", ids, np.full(tokens, IGNORED, dtype=np.int32), grids, pixels)
