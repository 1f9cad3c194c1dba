"""How long does a training step take beside transformers' own? The same weights, samples and threads, in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_rb.checkpoint.hf.training import TransformersStep, write_benchmark_model
from megatron_rb.config.schema import Config, ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rb.data.sample import EncodedSample, VisionGrid
from megatron_rb.evaluation.timing import Times, median_ratio, time_in_turn
from megatron_rb.models.robobrain.balance import default_layout
from megatron_rb.models.robobrain.config import RoboBrainShape, load_shape
from megatron_rb.models.robobrain.inputs import IGNORED, MicroBatch, build_micro_batch
from megatron_rb.parallel.groups import Place, build_groups, start_process_group
from megatron_rb.platform import Platform
from megatron_rb.train.build import build_trainable
from megatron_rb.train.step import Runner, train_pass

OURS = ("megatron-rb, packed", "megatron-rb, sample by sample")
REFERENCES = ("transformers, padded batch", "transformers, sample by sample")
ONE_PROCESS = ParallelConfig(distributed_optimizer=False, overlap_grad_reduce=False, overlap_param_gather=False)
"""The settings of `parallel=one_process`."""
LOSS_TOLERANCE = 1e-4
"""Largest difference of the first loss between the sides; past it they would not do the same work."""

GRIDS = (((16, 20), (24, 16)), ((12, 12), (20, 24)), ((28, 16), (8, 12)), ((20, 20), (16, 12)))
"""Height and width in patches of the two images of each sample."""
TEXT_TOKENS = (150, 110, 190, 140)
ANSWER_SHARE = 0.3


@dataclass(frozen=True)
class StepComparison:
    """Steps of every side on one model."""

    family: str
    tokens: int
    patches: int
    times: dict[str, Times]
    losses: dict[str, float]
    """Loss of the first step."""

    def faster(self, sides: Sequence[str]) -> str:
        """The way of feeding the batch that takes less CPU time here."""
        return min(sides, key=lambda side: self.times[side].median_cpu)

    @property
    def wall_ratio(self) -> float:
        """Time of our faster way over that of transformers' faster way: the median over the rounds."""
        return median_ratio(self.times[self.faster(OURS)].wall, self.times[self.faster(REFERENCES)].wall)

    @property
    def cpu_ratio(self) -> float:
        return median_ratio(self.times[self.faster(OURS)].cpu, self.times[self.faster(REFERENCES)].cpu)


def compare_steps(folder: str | Path, family: str, place: Place, platform: Platform, steps: int) -> StepComparison:
    """Time `steps` rounds on a new model in an empty folder.

    Raises:
        RuntimeError: the sides disagree on the first loss.
    """
    write_benchmark_model(folder, family)
    shape = load_shape(folder)
    samples = draw_batch(shape, seed=0)
    settings = OptimizerConfig()
    sides: dict[str, Callable[[], float]] = {
        OURS[0]: OurStep(folder, shape, [samples], settings, place, platform),
        OURS[1]: OurStep(folder, shape, [[sample] for sample in samples], settings, place, platform),
        REFERENCES[0]: TransformersStep(folder, shape, samples, settings, padded=True),
        REFERENCES[1]: TransformersStep(folder, shape, samples, settings, padded=False),
    }
    losses = {name: step() for name, step in sides.items()}  # also the warm-up
    if max(losses.values()) - min(losses.values()) > LOSS_TOLERANCE:
        raise RuntimeError(f"the sides compute different losses for {family}, their times say nothing: {losses}")
    tokens = sum(len(sample.input_ids) for sample in samples)
    patches = sum(sample.num_patches for sample in samples)
    return StepComparison(family, tokens, patches, time_in_turn(sides, steps), losses)


def one_process(platform: Platform, threads: int) -> Place:
    """A world of this process alone, whose operators use so many threads; made once."""
    torch.set_num_threads(threads)
    start_process_group(platform, 2.0)
    return build_groups(1, 1, 1, 2.0, seed=0)


class OurStep:
    """One training step of this stack as `rb train parallel=one_process` takes it, fp32.

    Args:
        packs: the samples of each micro-batch.
    """

    around: Callable[[Sequence[MicroBatch]], AbstractContextManager] = nullcontext
    """Surrounds forward and backward of a step, as a capture does."""

    def __init__(
        self, folder: str | Path, shape: RoboBrainShape, packs: Sequence[Sequence[EncodedSample]],
        settings: OptimizerConfig, place: Place, platform: Platform,
    ) -> None:  # fmt: skip
        model = ModelConfig(hf_path=str(folder), dtype="fp32")
        config = Config(model=model, optimizer=settings, parallel=ONE_PROCESS)
        layout = default_layout(shape, 1)
        trainable = build_trainable(config, shape, layout, place, platform, init=str(folder))
        self.packs, self.optimizer = packs, trainable.optimizer
        self.runner = Runner(trainable.chunks, shape, place, platform.current_device())

    def __call__(self) -> float:
        """Take one step; returns the loss per label before it."""
        for chunk in self.runner.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        batches = [
            build_micro_batch(samples, self.runner.shape, tp_rank=0, tp_size=1, sequence_parallel=False)
            for samples in self.packs
        ]
        with self.around(batches):
            results = train_pass(self.runner, batches)
        self.optimizer.step()
        labels = sum(float(result["num_labels"]) for result in results)
        return sum(float(result["loss_sum"]) for result in results) / labels


def draw_batch(shape: RoboBrainShape, seed: int) -> list[EncodedSample]:
    """Four samples of two images of different sizes and some text; the end of the text is the answer."""
    draw = np.random.default_rng(seed)
    return [
        _sample(shape, draw, f"drawn-{number}", sizes, text)
        for number, (sizes, text) in enumerate(zip(GRIDS, TEXT_TOKENS, strict=True))
    ]


def _sample(
    shape: RoboBrainShape, draw: np.random.Generator, name: str, sizes: Sequence[tuple[int, int]], text: int
) -> EncodedSample:
    special = min(shape.image_token_id, shape.video_token_id, shape.vision_start_token_id, shape.vision_end_token_id)
    grids = tuple(VisionGrid(1, height, width, "image") for height, width in sizes)
    ids: list[int] = []
    for grid in grids:
        tokens = grid.patches // shape.vision.merge_unit
        ids += [shape.vision_start_token_id, *[shape.image_token_id] * tokens, shape.vision_end_token_id]
    ids += draw.integers(0, special, size=text).tolist()
    labels = np.full(len(ids), IGNORED, dtype=np.int32)
    answer = round(text * ANSWER_SHARE)
    labels[-answer:] = ids[-answer:]
    pixels = [draw.standard_normal((grid.patches, shape.vision.patch_dim)).astype(np.float32) for grid in grids]
    return EncodedSample(name, np.array(ids, dtype=np.int32), labels, grids, pixels)
