"""How long does a training step take beside transformers' own? The same weights, samples and threads, in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from megatron_rb.app.session import session_of
from megatron_rb.bench.timing import Times, median_ratio, time_in_turn, time_one_by_one
from megatron_rb.checkpoint.hf.training import TransformersStep, write_benchmark_model
from megatron_rb.config.schema import Config, ModelConfig, ParallelConfig, PlatformConfig
from megatron_rb.data.mock_samples import draw_sample
from megatron_rb.data.sample import EncodedSample, VisionGrid
from megatron_rb.models.inputs import MicroBatch, build_micro_batch
from megatron_rb.parallel.session import Session
from megatron_rb.shapes.shape import RoboBrainShape
from megatron_rb.train.build import build_trainable
from megatron_rb.train.step import Runner, train_pass, update

OURS = ("megatron-rb, packed", "megatron-rb, sample by sample")
REFERENCES = ("transformers, padded batch", "transformers, sample by sample")
ONE_PROCESS = ParallelConfig(distributed_optimizer=False, overlap_grad_reduce=False, overlap_param_gather=False)
"""The settings of `parallel=one_process`."""
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
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
        return min((side for side in sides if side in self.times), key=lambda side: self.times[side].median_cpu)

    @property
    def wall_ratio(self) -> float:
        """Time of our faster way over that of transformers' faster way: the median over the rounds."""
        return median_ratio(self.times[self.faster(OURS)].wall, self.times[self.faster(REFERENCES)].wall)

    @property
    def cpu_ratio(self) -> float:
        return median_ratio(self.times[self.faster(OURS)].cpu, self.times[self.faster(REFERENCES)].cpu)


def compare_steps(folder: str | Path, family: str, steps: int, threads: int) -> StepComparison:
    """Time `steps` rounds on a new model in an empty folder.

    Raises:
        RuntimeError: the sides disagree on the first loss.
    """
    write_benchmark_model(folder, family)
    with session_of(one_process(folder, threads)) as session:
        samples = draw_batch(session.shape, seed=0)
        packs = {OURS[0]: [samples], OURS[1]: [[sample] for sample in samples]}
        return beside_transformers(session, one_process(folder, threads), packs, [samples], steps)


def one_process(folder: str | Path, threads: int) -> Config:
    """Settings of one CPU process alone in fp32, whose operators use so many threads."""
    platform = PlatformConfig("cpu", threads_per_rank=threads)
    return Config(model=ModelConfig(hf_path=str(folder), dtype="fp32"), parallel=ONE_PROCESS, platform=platform)


def beside_transformers(
    session: Session,
    config: Config,
    packs: Mapping[str, Sequence[Sequence[EncodedSample]]],
    padded: Sequence[Sequence[EncodedSample]],
    rounds: int,
) -> StepComparison:
    """Time steps of this stack and of transformers on the same samples, in turn where both fit the device's memory.

    Args:
        config: its model folder has weights, which both sides start from.
        packs: for ways of this stack to feed the samples, those of each micro-batch.
        padded: the samples of each padded batch of transformers.

    Raises:
        RuntimeError: the sides disagree on the first loss.
    """
    shape, platform = session.shape, session.platform
    folder, settings, dtype = config.model.hf_path, config.optimizer, config.model.dtype
    samples = [sample for batch in padded for sample in batch]
    builders: dict[str, Callable[[], Callable[[], float]]] = {
        name: partial(OurStep, session, config, batches) for name, batches in packs.items()
    }
    for name, batches in zip(REFERENCES, (padded, [[sample] for sample in samples]), strict=True):
        builders[name] = partial(TransformersStep, folder, shape, batches, settings, platform, dtype)
    if platform.name == "cpu":
        sides = {name: build() for name, build in builders.items()}
        losses = {name: side() for name, side in sides.items()}  # also the warm-up
        times = time_in_turn(sides, rounds)
    else:
        times, losses = time_one_by_one(builders, rounds, platform.empty_cache)
    if max(losses.values()) - min(losses.values()) > LOSS_TOLERANCE[dtype]:
        raise RuntimeError(f"the sides compute different losses for {folder}, their times say nothing: {losses}")
    tokens = sum(len(sample.input_ids) for sample in samples)
    patches = sum(sample.num_patches for sample in samples)
    return StepComparison(shape.family, tokens, patches, times, losses)


class OurStep:
    """One training step of this stack in one process.

    Args:
        packs: the samples of each micro-batch.
    """

    around: Callable[[Sequence[MicroBatch]], AbstractContextManager] = nullcontext
    """Surrounds forward and backward of a step, as a capture does."""

    def __init__(
        self,
        session: Session,
        config: Config,
        packs: Sequence[Sequence[EncodedSample]],
    ) -> None:
        trainable = build_trainable(session, config, config.model.hf_path)
        self.packs, self.optimizer, self.platform = packs, trainable.optimizer, session.platform
        self.runner = Runner(trainable.chunks, session)

    def __call__(self) -> float:
        """Take one step; returns the loss per label before it."""
        batches = [
            build_micro_batch(samples, self.runner.shape, tp_rank=0, tp_size=1, sequence_parallel=False)
            for samples in self.packs
        ]

        def run() -> list[dict[str, torch.Tensor]]:
            with self.around(batches):
                return train_pass(self.runner, batches)

        results, _ = update(self.runner.chunks, self.optimizer, run)
        labels = sum(float(result["num_labels"]) for result in results)
        loss = sum(float(result["loss_sum"]) for result in results) / labels
        self.platform.synchronize()
        return loss


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
    grids = tuple(VisionGrid(1, height, width, "image") for height, width in sizes)
    sample = draw_sample(shape, draw, name, grids, text, ANSWER_SHARE)
    sample.pixels = [draw.standard_normal((grid.patches, shape.vision.patch_dim)).astype(np.float32) for grid in grids]
    return sample
