"""Whether two folders compute the same: logits of drawn samples, in fp32, each side by its own program."""

from __future__ import annotations

from collections.abc import Callable, Set
from pathlib import Path

import torch

from megatron_rb.checkpoint.conversion.verify import Side
from megatron_rb.checkpoint.hf.oracle import run_transformers
from megatron_rb.checkpoint.manifest import find_side_files
from megatron_rb.config.schema import ParallelConfig
from megatron_rb.parity.differences import LOGITS_TOLERANCE
from megatron_rb.parity.report import read_layout, run_workers
from megatron_rb.parity.samples import draw_samples
from megatron_rb.parity.spec import ParitySpec, parity_config
from megatron_rb.shapes.shape import load_shape

ROUNDING = {"bfloat16": 2**-5, "float16": 2**-8}
"""Largest difference of a logit, relative to the largest one, that rounding the weights of one side to a type may make;
three times what it makes of small models."""


def forward_difference(
    sides: tuple[Side, Side], hf: str, folder: Path, start: Callable[[Path, int], int], seed: int = 7
) -> tuple[float, float]:
    """Largest absolute difference of a logit between two sides, and the largest logit.

    A Hugging Face folder is run by transformers, a checkpoint by this stack in one process; both need memory for the
    whole model in fp32.

    Args:
        hf: config of checkpoints that come without one.
        folder: scratch space.
        start: starts parity workers on a folder and returns their exit code.
    """
    logits = []
    for number, side in enumerate(sides):
        config = side.path if side.checkpoint is None else find_side_files(side.checkpoint, hf)
        shape = load_shape(config)
        samples = draw_samples(shape, seed)
        if side.checkpoint is None:
            trace = run_transformers(side.path, shape, samples, grads=False)
        else:
            parallel = ParallelConfig(layout=str(read_layout("", shape, 1)))
            spec = ParitySpec(str(side.checkpoint), grads=False)
            scratch = folder / str(number)
            scratch.mkdir()
            trace = run_workers(scratch, parity_config(str(config), parallel), spec, samples, start)
        assert trace.logits is not None
        logits.append(trace.logits)
    if logits[0].shape != logits[1].shape:
        raise ValueError(f"the two models give logits of the shapes {logits[0].shape} and {logits[1].shape}")
    gap = torch.nan_to_num((logits[0] - logits[1]).abs(), nan=float("inf"))
    return float(gap.max()), float(max(side.abs().max() for side in logits))


def logit_limit(rounded_to: Set[str], largest: float) -> float:
    """The largest difference of a logit between two sides that compute the same, both in fp32.

    Args:
        rounded_to: types of weights that one side has and the other has not; empty = both have the same.
        largest: absolute value of a logit.
    """
    shares = [share for name, share in ROUNDING.items() if name in rounded_to]
    return max(LOGITS_TOLERANCE, max([LOGITS_TOLERANCE, *shares]) * largest)
