"""Builds the model side of a run: chunks with weights, data parallelism, optimizer, schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_rb.checkpoint.hf.reader import HFReader
from megatron_rb.checkpoint.manager import load_weights
from megatron_rb.checkpoint.manifest import is_checkpoint
from megatron_rb.config.schema import Config, FreezeConfig, RecomputeConfig
from megatron_rb.kernels.dispatch import KernelRequests
from megatron_rb.layout import PipelineLayout
from megatron_rb.models.build import (
    ModelOptions,
    build_stages,
    fill_weights,
    named_parameters,
    part_of,
    random_weights,
)
from megatron_rb.models.layer_choice import select_layers
from megatron_rb.models.stage import Recompute, RoboBrainStage
from megatron_rb.parallel.groups import Place
from megatron_rb.platform import Platform
from megatron_rb.shapes.foreign import foreign_kind
from megatron_rb.shapes.shape import RoboBrainShape, model_fingerprint
from megatron_rb.train.gradients import gradient_finalizer, tie_embeddings
from megatron_rb.train.optimizer import build_optimizer, ddp_config


@dataclass(frozen=True)
class Trainable:
    """The model chunks of this rank, ready for training."""

    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer


def build_trainable(
    config: Config, shape: RoboBrainShape, layout: PipelineLayout, place: Place, platform: Platform, init: str
) -> Trainable:
    """Model, weights, data parallelism, optimizer: in this order, so that fp32 main weights start from the weights."""
    options = ModelOptions(
        dtype=config.model.dtype,
        sequence_parallel=config.parallel.sequence_parallel,
        recompute=_recompute(config.model.recompute),
        kernels=KernelRequests(**vars(config.kernels)),
    )
    layers = select_layers(config.model.layers, config.model.dtype, platform.offers("te"))
    stages = build_stages(shape, layout, place, options, layers, platform.current_device())
    initialise(stages, shape, place, init, config.seed)
    freeze(stages, config.model.freeze)
    tied = tie_embeddings(stages, layout, shape.text.tied_embeddings)
    chunks = wrap_for_data_parallelism(config, stages)
    connect_schedule(stages, chunks, gradient_finalizer(tied))
    return Trainable(chunks, build_optimizer(config, chunks))


def _recompute(settings: RecomputeConfig) -> Recompute:
    return Recompute(
        settings.vision, settings.language, tuple(settings.vision_per_slice), tuple(settings.language_per_slice)
    )


def initialise(stages: list[RoboBrainStage], shape: RoboBrainShape, place: Place, init: str, seed: int) -> None:
    """Give the stages their first weights: fresh ones when `init` is `random`, else those of a folder.

    Raises:
        ValueError: the folder is neither a checkpoint nor a Hugging Face folder, or is of another model.
    """
    if init == "random":
        fill_weights(stages, place, random_weights(stages, seed))
    elif is_checkpoint(init):
        load_weights(list(stages), model_fingerprint(shape), init)
    elif (Path(init) / "config.json").is_file():
        fill_weights(stages, place, HFReader(init, shape).read)
    elif kind := foreign_kind(init):
        raise ValueError(f"checkpoint.init: {init} {kind}")
    else:
        raise ValueError(
            f"checkpoint.init '{init}' is neither a checkpoint nor a Hugging Face folder; "
            f"give one of them, or checkpoint.init=random for fresh weights"
        )


def freeze(stages: Sequence[RoboBrainStage], settings: FreezeConfig) -> None:
    """Take the frozen parts of the model out of training."""
    for name, parameter in named_parameters(list(stages)):
        parameter.requires_grad_(not getattr(settings, part_of(name)))


def wrap_for_data_parallelism(config: Config, stages: Sequence[RoboBrainStage]) -> list[DistributedDataParallel]:
    """One megatron-core DDP per chunk; only the first cuts its gradients into buckets, as megatron-core advises."""
    settings = ddp_config(config)
    return [
        DistributedDataParallel(stage.config, settings, stage, disable_bucketing=number > 0)
        for number, stage in enumerate(stages)
    ]


def connect_schedule(stages: Sequence[RoboBrainStage], chunks: Sequence[DistributedDataParallel], finalize) -> None:
    """Tell megatron-core's schedules when gradients may be reduced and what to do at the end."""
    core_config = stages[0].config
    core_config.finalize_model_grads_func = finalize
    several = len(chunks) > 1
    core_config.no_sync_func = [chunk.no_sync for chunk in chunks] if several else chunks[0].no_sync
