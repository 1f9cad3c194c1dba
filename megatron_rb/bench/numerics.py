"""What a capture costs a step, and what comparing two captures of a real model takes."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_rb.app.session import session_of
from megatron_rb.bench.step import OurStep, draw_batch, one_process
from megatron_rb.bench.timing import Times, median_ratio, time_in_turn
from megatron_rb.capture.files import DESCRIPTION, VERSION, RankFile, write_json
from megatron_rb.capture.points import Point, Rows, block_names, points_of
from megatron_rb.capture.step_capture import StepCapture, kept_parts
from megatron_rb.capture.weights import feature_ids
from megatron_rb.checkpoint.hf.training import write_benchmark_model
from megatron_rb.config.child_processes import follow_parent
from megatron_rb.config.failures import ProcessFailed
from megatron_rb.config.schema import CaptureConfig
from megatron_rb.models.inputs import MicroBatch
from megatron_rb.shapes.shape import RoboBrainShape, model_fingerprint, shape_from_dict

POOL = 1 << 24
"""Random values that all tensors of a made-up capture are cut from."""
WINDOW, FRAME = 64, 256
"""Patches of a window and of a frame of the made-up samples."""


@dataclass(frozen=True)
class CaptureCost:
    """Steps without a capture, with one that is not due, and captured ones, timed in turn."""

    family: str
    times: dict[str, Times]
    num_bytes: int

    def added(self, side: str) -> float:
        """Share of a plain step that a step of this side takes in addition."""
        return median_ratio(self.times[side].wall, self.times["plain"].wall) - 1

    def added_per_step(self, every: int) -> float:
        """Share that all steps of a run take in addition when one of `every` is captured."""
        waiting, captured = self.added("not due"), self.added("captured")
        return waiting + (captured - waiting) / every


def capture_cost(folder: Path, family: str, rounds: int) -> CaptureCost:
    """Time steps of `rb bench step`'s small model (fp32, one process)."""
    write_benchmark_model(folder / "hf", family)
    config = one_process(folder / "hf", threads=1)
    with session_of(config) as session:
        step = OurStep(session, config, [draw_batch(session.shape, seed=0)])
        sides = {"plain": partial(_run_with, step, nullcontext)}
        for name, capture in _captures(folder, step).items():
            sides[name] = partial(_run_with, step, partial(capture.of_step, 2))
        for side in sides.values():
            side()  # the warm-up
        times = time_in_turn(sides, rounds)
    num_bytes = sum(path.stat().st_size for path in (folder / "due").rglob("*") if path.is_file())
    return CaptureCost(family, times, num_bytes)


def _captures(folder: Path, step: OurStep) -> dict[str, StepCapture]:
    """One that waits in the step that is timed, and one that is due."""
    session = step.runner.session
    stages = [chunk.module for chunk in step.runner.chunks]
    description = {"model": model_fingerprint(session.shape), "dtype": "fp32", "layout": {"tp_size": 1}}
    settings = {"not due": CaptureConfig(every=100), "captured": CaptureConfig(every=1, limit=10**6)}
    folders = {"not due": folder / "not_due", "captured": folder / "due"}
    return {name: StepCapture(settings[name], folders[name], stages, session.mesh, description) for name in settings}


def _run_with(step: OurStep, around: Callable[[Sequence[MicroBatch]], AbstractContextManager]) -> float:
    step.around = around
    return step()


@dataclass(frozen=True)
class ComparisonCost:
    """One `rb compare numerics` on two captures, in a process of its own."""

    model: str
    num_bytes: int
    """Of each capture."""
    seconds: float
    cpu_seconds: float
    """What else the machine does hardly shows in it."""
    peak_memory: int
    """Bytes of resident memory."""


def comparison_cost(folder: Path, name: str, config: dict[str, Any]) -> ComparisonCost:
    """Write two captures of noise in the shapes of a model, compare them with report and pictures, remove them."""
    shape = shape_from_dict(config)
    sides = [folder / "a", folder / "b"]
    for number, side in enumerate(sides):
        write_random_capture(side, shape, CaptureConfig(), last_bit=number)
    num_bytes = sum(path.stat().st_size for path in sides[0].iterdir())
    command = [sys.executable, "-m", "megatron_rb.cli", "compare", "numerics", *map(str, sides), "--out"]
    start = time.perf_counter()
    process = subprocess.Popen(
        [*command, str(folder / "report")], stdout=subprocess.DEVNULL, preexec_fn=follow_parent()
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, 1):  # noise obeys no definition: defects are found
        raise ProcessFailed(" ".join(command), code)
    for side in sides:
        shutil.rmtree(side)
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return ComparisonCost(name, num_bytes, seconds, cpu_seconds, usage.ru_maxrss * 1024)


def write_random_capture(folder: Path, shape: RoboBrainShape, settings: CaptureConfig, last_bit: int) -> None:
    """A capture of one rank in bf16 with the tensors that a real one has, all of them noise.

    Args:
        last_bit: xor on the last bit of every value.
    """
    noise = np.random.default_rng(0).standard_normal(POOL).astype(np.float32)
    pool = torch.from_numpy(noise).to(torch.bfloat16).view(torch.int16).bitwise_xor_(last_bit).view(torch.bfloat16)
    places = itertools.count(0, 7919)

    def draw(rows: int, columns: int) -> torch.Tensor:
        start = next(places) % (POOL - rows * columns)
        return pool[start : start + rows * columns].view(rows, columns)

    file = RankFile(folder, 0)
    rows = _rows(settings, shape)
    names = [f"made-up-{number}" for number in range(settings.samples)]
    for number, name in enumerate(names):
        for part, dim in (("patch", shape.vision.head_dim), ("token", shape.text.head_dim)):
            for table in ("cos", "sin"):
                kept = rows[Rows(part)]
                file.add(f"value/{number}/angles/{part}_{table}", draw(len(kept), dim // 2).float(), kept, None)
        for block in _blocks(shape):
            for point in points_of(block):
                for what in ("value", "grad"):
                    kept = rows[point.rows]
                    if point.context and what == "value":
                        kept = np.arange(settings.context)
                    piece = draw(len(kept), _width(block, point, shape))
                    file.add(f"{what}/{number}/{block}/{point.name}", piece, kept, None)
        borders = {"windows": list(range(0, 1025, WINDOW)), "frames": list(range(0, 1025, FRAME))}
        file.samples[name] = {"text": "0", "pixels": "0", "tokens": 1024, "patches": 1024, **borders}
    for weight, outputs, inputs in _weights(shape):
        ids = feature_ids(outputs, settings.features)
        file.add(f"weight/{weight}", draw(len(ids), inputs), ids, None)
        file.weights[weight] = {"dtype": "torch.bfloat16", "hash": "0", "bf16_hash": "0"}
    file.finish()
    content = {
        "version": VERSION,
        "step": 1,
        "samples": names,
        "world_size": 1,
        "dtype": "bf16",
        "layout": {"tp_size": 1},
        "settings": kept_parts(settings),
        "model": model_fingerprint(shape),
    }
    write_json(folder / DESCRIPTION, content)


def _blocks(shape: RoboBrainShape) -> list[str]:
    deepstack = tuple(sorted(shape.vision.deepstack_layers))
    return block_names(shape.vision.num_layers, deepstack, shape.text.num_layers)


def _rows(settings: CaptureConfig, shape: RoboBrainShape) -> dict[Rows, np.ndarray]:
    unit = shape.vision.merge_unit
    tokens = np.unique(np.linspace(0, settings.context - 1, settings.rows).round().astype(np.int64))
    merged = np.unique(np.linspace(0, settings.context // unit - 1, settings.rows // unit).round().astype(np.int64))
    patches = (merged[:, None] * unit + np.arange(unit)).reshape(-1)
    return {Rows.TOKEN: tokens, Rows.LABEL: tokens, Rows.PATCH: patches, Rows.MERGED: merged}


def _width(block: str, point: Point, shape: RoboBrainShape) -> int:
    vision, text = shape.vision, shape.text
    merged = vision.hidden_size * vision.merge_unit
    if block.startswith(("vision.merger", "vision.deepstack")):
        norm = vision.hidden_size if point.rows is Rows.PATCH else merged
        return {"fc1": merged, "activation": merged, "output": text.hidden_size}.get(point.name, norm)
    if block.startswith("vision."):
        hidden, ffn = vision.hidden_size, vision.ffn_hidden_size
        wide = {"qkv": 3 * hidden, "fc1": (1 + vision.gated_mlp) * ffn, "activation": ffn}
        return wide.get(point.name, hidden)
    heads, groups, dim = text.num_heads, text.num_query_groups, text.head_dim
    if block == "language.head":
        return text.hidden_size
    wide = {
        "qkv": (heads + 2 * groups) * dim,
        "q": heads * dim,
        "k": groups * dim,
        "v": groups * dim,
        "attention": heads * dim,
        "fc1": 2 * text.ffn_hidden_size,
        "activation": text.ffn_hidden_size,
    }
    return wide.get(point.name, text.hidden_size)


def _weights(shape: RoboBrainShape) -> Iterator[tuple[str, int, int]]:
    """Name, output and input features of every weight that is kept; norms as one row."""
    vision, text = shape.vision, shape.text
    for layer in range(vision.num_layers):
        hidden, ffn = vision.hidden_size, vision.ffn_hidden_size
        yield from _layer(
            f"vision.layers.{layer}", ("norm1", "norm2"), hidden, 3 * hidden, hidden, ffn, vision.gated_mlp
        )
    merged = vision.hidden_size * vision.merge_unit
    yield "vision.merger.norm.weight", 1, vision.hidden_size
    yield "vision.merger.linear_fc1.weight", merged, merged
    yield "vision.merger.linear_fc2.weight", text.hidden_size, merged
    for layer in range(text.num_layers):
        heads = text.num_heads * text.head_dim
        packed = heads + 2 * text.num_query_groups * text.head_dim
        norms = ("input_norm", "post_attention_norm")
        yield from _layer(
            f"language.layers.{layer}", norms, text.hidden_size, packed, heads, text.ffn_hidden_size, True
        )
    yield "language.head.norm.weight", 1, text.hidden_size


def _layer(
    name: str, norms: tuple[str, str], hidden: int, packed: int, heads: int, ffn: int, gated: bool
) -> Iterator[tuple[str, int, int]]:
    for norm in norms:
        yield f"{name}.{norm}.weight", 1, hidden
    yield f"{name}.attention.linear_qkv.weight", packed, hidden
    yield f"{name}.attention.linear_proj.weight", hidden, heads
    yield f"{name}.mlp.linear_fc1.weight", (1 + gated) * ffn, hidden
    yield f"{name}.mlp.linear_fc2.weight", hidden, ffn
