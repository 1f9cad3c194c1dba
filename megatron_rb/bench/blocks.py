"""Times single blocks of a model on the present device: what the planner's calibrated mode is made of."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from megatron_rb.config.schema import Config, ModelConfig, ParallelConfig
from megatron_rb.data.sample import EncodedSample, VisionGrid
from megatron_rb.models.inputs import IGNORED, MicroBatch, build_micro_batch, to_device
from megatron_rb.models.language.blocks import HeadOutput
from megatron_rb.models.stage import RoboBrainStage
from megatron_rb.parallel.session import Session
from megatron_rb.planner.calibration import Calibration, Curve
from megatron_rb.planner.cost import Pricing, compute_seconds, optimizer_seconds
from megatron_rb.planner.device import Device
from megatron_rb.planner.trained import Frozen
from megatron_rb.planner.work import Part, Shards, forward_work, parameters
from megatron_rb.planner.workload import MicroBatches
from megatron_rb.platform import Platform
from megatron_rb.platform.dtypes import DTYPES
from megatron_rb.shapes.balance import default_layout
from megatron_rb.shapes.shape import RoboBrainShape
from megatron_rb.train.build import Trainable, build_trainable

ALONE = ParallelConfig(distributed_optimizer=False, overlap_grad_reduce=False, overlap_param_gather=False)
SAMPLES = 4
"""Samples of a timed micro-batch, each with one picture."""


@dataclass(frozen=True)
class BlockTime:
    """One block at one size."""

    part: str
    direction: str
    """`forward` or `backward`."""
    tokens: int
    patches: int
    nominal: float
    """Seconds by the figures of the device."""
    measured: float
    """Seconds, median over the rounds."""


def few_layers(shape: RoboBrainShape) -> RoboBrainShape:
    """The same model with one layer of every kind."""
    vision = shape.vision
    windowed = vision.window_size > 0
    deepstack = (0,) if vision.deepstack_layers else ()
    full = (1,) if windowed else (0,)
    vision = replace(vision, num_layers=2 if windowed else 1, full_attention_layers=full, deepstack_layers=deepstack)
    return replace(shape, vision=vision, text=replace(shape.text, num_layers=1))


def build_blocks(session: Session, dtype: str) -> Trainable:
    """One layer of every kind as training builds it, with gradient buffers and optimizer."""
    small = few_layers(session.shape)
    config = Config(model=ModelConfig(dtype=dtype), parallel=ALONE)
    return build_trainable(session.with_model(small, default_layout(small, 1)), config, init="random")


def draw_micro_batch(
    shape: RoboBrainShape, tokens: int, patches: int, seed: int = 0, samples: int = SAMPLES, cp_size: int = 1
) -> MicroBatch:
    """Samples of one picture each: about `patches` patches, `tokens` tokens; the text is the answer.

    Args:
        cp_size: context-parallel ranks, of which the first one's part is given.
    """
    draw = np.random.default_rng(seed)
    unit, side = shape.vision.merge_unit, shape.vision.spatial_merge_size
    height = max(1, round((patches / samples) ** 0.5 / side)) * side
    width = max(1, round(patches / samples / height / side)) * side
    drawn = []
    for number in range(samples):
        grid = VisionGrid(1, height, width, "image")
        text = max(2, tokens // samples - grid.patches // unit - 2)
        words = draw.integers(0, min(100, shape.text.vocab_size), size=text).tolist()
        image = [shape.vision_start_token_id, *[shape.image_token_id] * (grid.patches // unit)]
        ids = np.array([*image, shape.vision_end_token_id, *words], dtype=np.int32)
        labels = np.full(len(ids), IGNORED, dtype=np.int32)
        labels[-text:] = ids[-text:]
        pixels = draw.standard_normal((grid.patches, shape.vision.patch_dim)).astype(np.float32)
        drawn.append(EncodedSample(f"drawn-{number}", ids, labels, (grid,), [pixels]))
    return build_micro_batch(drawn, shape, tp_rank=0, tp_size=1, sequence_parallel=False, cp_size=cp_size)


def sizes_of(batch: MicroBatch) -> MicroBatches:
    """A micro-batch as the cost model sees it, arrays of one entry."""
    lengths, frames = (np.diff(part.cu_seqlens.numpy()) for part in (batch.text.samples, batch.vision.frames))
    columns = (
        batch.text.num_tokens,
        (lengths.astype(np.float64) ** 2).sum(),
        batch.vision.num_patches,
        (frames.astype(np.float64) ** 2).sum(),
        len(batch.text.labels),
        len(batch.sample_ids),
    )
    return MicroBatches(*(np.array([float(value)]) for value in columns))


@dataclass(frozen=True)
class TimedBlock:
    """A block with inputs for one micro-batch."""

    part: Part
    run: Callable[[torch.Tensor], torch.Tensor]
    """From what flows in to what flows out."""
    rows: int
    width: int

    def inputs(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.randn(self.rows, 1, self.width, dtype=dtype, device=device, requires_grad=True)


def calls_of(stage: RoboBrainStage, batch: MicroBatch) -> Iterator[TimedBlock]:
    """Every kind of block once."""
    shape = stage.shape
    vision, language = stage.vision, stage.language
    patches, hidden = batch.vision.num_patches, shape.vision.hidden_size
    tokens, width, merged = batch.text.num_tokens, shape.text.hidden_size, patches // shape.vision.merge_unit
    merger, embedding, output = vision.merger, language.embedding, language.head
    patch_embed = vision.patch_embed
    assert patch_embed is not None and merger is not None and embedding is not None and output is not None
    yield TimedBlock(Part.PATCH_EMBED, lambda _: patch_embed(batch.vision), 1, 1)
    for layer in vision.layers.values():
        part = Part.WINDOW_LAYER if layer.windowed else Part.FULL_LAYER
        yield TimedBlock(part, partial(_with, layer, batch.vision), patches, hidden)
    for module in vision.deepstack.values():
        yield TimedBlock(Part.DEEPSTACK, module, patches, hidden)
    yield TimedBlock(Part.MERGER, merger, patches, hidden)
    yield TimedBlock(Part.EMBEDDING, lambda x: embedding(batch.text, x), merged, width)
    for layer in language.layers.values():
        yield TimedBlock(Part.DECODER, partial(_with, layer, batch.text), tokens, width)

    yield TimedBlock(Part.HEAD, lambda x: output(x, batch.text, HeadOutput.LOSS), tokens, width)


def _with(layer: torch.nn.Module, inputs: object, x: torch.Tensor) -> torch.Tensor:
    return layer(x, inputs)


def time_blocks(
    session: Session,
    pricing: Pricing,
    sizes: Sequence[tuple[int, int]],
    rounds: int,
    report: Callable[[BlockTime], None] = lambda _: None,
) -> list[BlockTime]:
    """Forward and backward time of every kind of block at every size `(tokens, patches)`."""
    trainable = build_blocks(session, pricing.dtype)
    shape, platform, device = session.shape, session.platform, session.device
    chunk = trainable.chunks[0]
    times: list[BlockTime] = []
    for tokens, patches in sizes:
        batch = to_device(draw_micro_batch(shape, tokens, patches), shape, device)
        seen = sizes_of(batch)
        works = forward_work(shape, Shards(1, False, pricing.itemsize), seen)
        for call in calls_of(chunk.module, batch):
            chunk.zero_grad_buffer()
            inputs = call.inputs(DTYPES[pricing.dtype], device)
            measured = _time(call, inputs, platform, rounds)
            expected = compute_seconds(call.part, works[call.part], pricing, Frozen(), parameters(shape, 1)[call.part])
            for direction, nominal, seconds in zip(("forward", "backward"), expected, measured, strict=True):
                item = BlockTime(
                    call.part.name, direction, int(seen.tokens[0]), int(seen.patches[0]), float(nominal[0]), seconds
                )
                report(item)
                times.append(item)
    times.append(_time_optimizer(trainable, pricing, platform, rounds))
    report(times[-1])
    return times


def _time(call: TimedBlock, inputs: torch.Tensor, platform: Platform, rounds: int) -> tuple[float, float]:
    ahead, back = [], []
    for number in range(rounds + 1):
        platform.synchronize()
        start = time.perf_counter()
        out = call.run(inputs)
        platform.synchronize()
        middle = time.perf_counter()
        out.backward(torch.ones_like(out))
        platform.synchronize()
        if number:  # the first is the warm-up
            ahead.append(middle - start)
            back.append(time.perf_counter() - middle)
        inputs.grad = None
    return statistics.median(ahead), statistics.median(back)


def _time_optimizer(trainable: Trainable, pricing: Pricing, platform: Platform, rounds: int) -> BlockTime:
    chunk, seconds = trainable.chunks[0], []
    count = sum(parameter.numel() for parameter in chunk.parameters())
    for number in range(rounds + 1):
        platform.synchronize()
        start = time.perf_counter()
        trainable.optimizer.step()
        chunk.zero_grad_buffer()
        trainable.optimizer.zero_grad()
        platform.synchronize()
        if number:
            seconds.append(time.perf_counter() - start)
    nominal = optimizer_seconds(count, 1, False, pricing)
    return BlockTime("OPTIMIZER", "forward", 0, 0, nominal, statistics.median(seconds))


def calibration_of(times: Sequence[BlockTime], device: Device, dtype: str, where: str) -> Calibration:
    """Curves of measured over nominal times.

    Args:
        where: hardware and versions, in words.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for item in times:
        points.setdefault(f"{item.part}.{item.direction}", []).append((item.nominal, item.measured))
    curves = {name: Curve(*zip(*sorted(pairs), strict=True)) for name, pairs in points.items()}
    return Calibration(where, dtype, device.name, curves)
