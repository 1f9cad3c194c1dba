"""Builds the model side of a run: chunks with weights, data parallelism, optimizer, schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_rb.checkpoint.hf.reader import HFReader
from megatron_rb.checkpoint.manager import load_weights
from megatron_rb.checkpoint.manifest import holds_adapters, is_checkpoint, read_manifest
from megatron_rb.config.schema import Config, FreezeConfig
from megatron_rb.models.build import (
    ModelOptions,
    build_stages,
    fill_weights,
    named_parameters,
    part_of,
    random_weights,
)
from megatron_rb.models.layers import LayerProvider
from megatron_rb.models.stage import RoboBrainStage
from megatron_rb.parallel.collectives import raise_together
from megatron_rb.parallel.mesh import Mesh
from megatron_rb.parallel.session import Session
from megatron_rb.shapes.foreign import check_init, no_first_weights
from megatron_rb.shapes.shape import RoboBrainShape, model_fingerprint
from megatron_rb.train.adapters import add_adapters, check_base, fill_base, identity, load_adapted, train_adapters_only
from megatron_rb.train.gradients import gradient_finalizer, tie_embeddings
from megatron_rb.train.optimizers import build_optimizer, ddp_config


@dataclass(frozen=True)
class Trainable:
    """The model chunks of this rank, ready for training."""

    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    identity: dict[str, Any] = field(default_factory=dict)
    """What identifies its checkpoints beside the sizes of the model: see `adapters.identity`."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Where its frozen weights lie, for those who look for them later."""


def build_trainable(session: Session, config: Config, init: str) -> Trainable:
    """Model, weights, data parallelism, optimizer: in this order, so that fp32 main weights start from the weights."""
    own: dict[str, Any] = {}
    notes = {"base_folder": str(Path(init).resolve())} if config.model.adapters else {}
    if config.model.adapters:
        check_first_weights(init, session.mesh)
        if is_checkpoint(init):
            raise ValueError(
                f"model.adapters belong to the weights of a Hugging Face folder, and checkpoint.init {init} is a "
                f"checkpoint; make one of it with: rb convert export --ckpt {init} --out DIR"
            )
        stages = build_stages(session, ModelOptions.of(config))
        base = fill_base(stages, session, init)
        check_base(config.model, session.shape, base)
        add_adapters(stages, session, config.model, config.seed)
        train_adapters_only(stages, config.model.train_in_full)
        own = identity(config.model, session.shape, base)
    else:
        if is_checkpoint(init) and holds_adapters(read_manifest(init)):
            raise ValueError(
                f"checkpoint.init {init} holds adapters alone; make whole weights of it with: "
                f"rb convert export --ckpt {init} --out DIR"
            )
        stages = build_model(session, ModelOptions.of(config), init, config.seed)
        freeze(stages, config.model.freeze)
    tied = tie_embeddings(stages, session)
    chunks = wrap_for_data_parallelism(config, stages)
    connect_schedule(stages, chunks, gradient_finalizer(tied, session.mesh))
    return Trainable(chunks, build_optimizer(config, chunks), own, notes)


def build_model(
    session: Session, options: ModelOptions, init: str, seed: int = 0, layers: LayerProvider | None = None
) -> list[RoboBrainStage]:
    """The chunks of this rank with their first weights: see `build_stages` and `initialise`."""
    stages = build_stages(session, options, layers)
    initialise(stages, session, init, seed)
    return stages


def initialise(stages: list[RoboBrainStage], session: Session, init: str, seed: int) -> None:
    """Give the stages their first weights: fresh ones when `init` is `random`, else those of a folder.

    Raises:
        ValueError: the folder is neither a checkpoint nor a Hugging Face folder, or is of another model.
    """
    if init == "random":
        fill_weights(stages, session.mesh, random_weights(stages, seed))
        return
    check_first_weights(init, session.mesh)
    if is_checkpoint(init) and holds_adapters(read_manifest(init)):
        load_adapted(stages, session, init)
    elif is_checkpoint(init):
        load_weights(list(stages), model_fingerprint(session.shape), init)
    else:
        fill_weights(stages, session.mesh, _opened_when_read(init, session.shape))


def check_first_weights(init: str, mesh: Mesh) -> None:
    """Refuse, on all ranks, a folder that one of them does not see as weights: the others would wait for it."""
    failure = None
    try:
        check_init(init)
        if not (is_checkpoint(init) or (Path(init) / "config.json").is_file()):
            failure = ValueError(no_first_weights(init))
    except ValueError as error:
        failure = error
    if mesh.groups:
        raise_together(failure)
    elif failure is not None:
        raise failure


def _opened_when_read(folder: str, shape: RoboBrainShape) -> Callable[[str], torch.Tensor]:
    """Weights of a Hugging Face folder; a rank that reads none does not look at it."""
    reader = cache(partial(HFReader, folder, shape))
    return lambda name: reader().read(name)


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
