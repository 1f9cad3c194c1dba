"""Optimizers over the model chunks of a rank: parameter groups, data parallelism, what megatron-core needs to know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as McoreOptimizerConfig
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from megatron_rb.config.optimizers import OPTIMIZERS as TRAITS
from megatron_rb.config.schema import Config, OptimizerConfig, ParallelConfig
from megatron_rb.models.build import MODEL_PARTS, ModelPart, part_of

ParameterGroups = list[dict[str, Any]]
STAND_IN: dict[str, Any] = {"optimizer": "sgd", "sgd_momentum": 0.0}
"""What megatron-core wraps in the place of an optimizer that it does not know."""


@dataclass(frozen=True)
class OptimizerSpec:
    """How an optimizer is built: by megatron-core, or by `build` where megatron-core does not know it."""

    group: Callable[[OptimizerConfig], dict[str, Any]]
    """What its parameter groups hold beside learning rate and weight decay, in torch's words."""
    distributed: bool = False
    """It works with megatron-core's distributed optimizer."""
    settings: Callable[[OptimizerConfig], dict[str, Any]] = lambda _: STAND_IN
    """megatron-core's own settings of it."""
    build: Callable[[ParameterGroups], torch.optim.Optimizer] | None = None
    """Constructor of an optimizer of torch's kind; what it needs is in the groups."""
    init_state: Callable[..., None] | None = None
    """Allocates the state of torch's optimizer where megatron-core does not; with `build`, zeros under the names of
    `megatron_rb.config.optimizers` where it is left out."""


def _adamw_settings(settings: OptimizerConfig) -> dict[str, Any]:
    return {
        "optimizer": "adam",
        "adam_beta1": settings.beta1,
        "adam_beta2": settings.beta2,
        "adam_eps": settings.eps,
    }


def _adamw_group(settings: OptimizerConfig) -> dict[str, Any]:
    return {"betas": (settings.beta1, settings.beta2), "eps": settings.eps}


def _sgd_settings(settings: OptimizerConfig) -> dict[str, Any]:
    return {"optimizer": "sgd", "sgd_momentum": settings.momentum}


def _init_momentum(optimizer: torch.optim.Optimizer, config: object = None) -> None:
    """Zeros, which give the first step that torch gives it without a buffer."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if group["momentum"] and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)


OPTIMIZERS = {
    "adamw": OptimizerSpec(_adamw_group, distributed=True, settings=_adamw_settings),
    "sgd": OptimizerSpec(
        lambda settings: {"momentum": settings.momentum}, settings=_sgd_settings, init_state=_init_momentum
    ),
}
"""By the names of `megatron_rb.config.optimizers`."""


def lr_ratio(settings: OptimizerConfig, part: ModelPart) -> float:
    """Factor on the learning rate of the language model."""
    ratios = {"vision": settings.vision_lr_ratio, "merger": settings.merger_lr_ratio, "language": 1.0}
    return ratios[part]


def ddp_config(config: Config) -> DistributedDataParallelConfig:
    """Data-parallel settings for every model chunk.

    Parameters are gathered during the next forward pass only when the optimizer is distributed and gradients are
    reduced during the backward pass: megatron-core has no other combination.
    """
    parallel = config.parallel
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.model.dtype == "bf16",
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=_overlaps_param_gather(parallel),
        use_distributed_optimizer=parallel.distributed_optimizer,
    )


def build_optimizer(config: Config, chunks: Sequence[DistributedDataParallel]) -> MegatronOptimizer:
    """The optimizer of this rank; every rank of the world calls it, those without trainable parameters too.

    Raises:
        ValueError: no rank has a trainable parameter.
    """
    settings, parallel = config.optimizer, config.parallel
    implementation = OPTIMIZERS[settings.name]
    bf16 = config.model.dtype == "bf16"
    mcore_config = McoreOptimizerConfig(
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        clip_grad=settings.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_param_gather=_overlaps_param_gather(parallel),
        **implementation.settings(settings),
    )
    overrides = _group_overrides(settings)
    optimizer = get_megatron_optimizer(
        mcore_config, list(chunks), config_overrides=overrides, use_gloo_process_groups=False
    )
    if not optimizer.param_groups:
        raise ValueError("every part of the model is frozen, there is nothing to train; unfreeze one in model.freeze")
    if implementation.build is not None:
        _put_in_place(optimizer, implementation.build, settings)
    _allocate_state(optimizer, settings.name)
    return optimizer


def _overlaps_param_gather(parallel: ParallelConfig) -> bool:
    return parallel.overlap_param_gather and parallel.overlap_grad_reduce and parallel.distributed_optimizer


def _group_overrides(settings: OptimizerConfig) -> dict[ParamKey, ParamGroupOverride]:
    """Weight decay for matrices only, and one learning rate per model part.

    `lr_mult` carries the ratio as well: groups are told apart by it when a checkpoint is loaded, not by `max_lr`
    (`GROUP_IDENTITY` of the shims).
    """
    overrides: dict[ParamKey, ParamGroupOverride] = {
        _named("no_decay", lambda parameter, name: parameter.dim() < 2 or name.endswith(".bias")): {"wd_mult": 0.0}
    }
    for part in MODEL_PARTS:
        ratio = lr_ratio(settings, part)
        key = _named(f"part_{part}", lambda _, name, part=part: part_of(name) == part)
        overrides[key] = {"max_lr": settings.lr * ratio, "min_lr": settings.min_lr * ratio, "lr_mult": ratio}
    return overrides


def _named(name: str, matches) -> ParamKey:
    return ParamKey(with_name_predicate=ParamWithNamePredicate(name=name, fn=matches))


def _put_in_place(
    optimizer: MegatronOptimizer, build: Callable[[ParameterGroups], torch.optim.Optimizer], settings: OptimizerConfig
) -> None:
    """Let megatron-core's wrappers, and their fp32 copies of bf16 weights, drive another optimizer than its SGD."""
    own = {"lr": settings.lr, "weight_decay": settings.weight_decay, **OPTIMIZERS[settings.name].group(settings)}
    for part in _parts(optimizer):
        base = part.optimizer
        part.optimizer = build(
            [
                {key: value for key, value in group.items() if key not in base.defaults} | own
                for group in base.param_groups
            ]
        )


def _allocate_state(optimizer: MegatronOptimizer, name: str) -> None:
    """Allocate the state now instead of in the first step, so that memory is known and step 0 can be saved."""
    implementation = OPTIMIZERS[name]
    zeros = partial(_init_zeros, TRAITS[name].state) if implementation.build is not None else None
    init_state = implementation.init_state or zeros
    for part in _parts(optimizer):
        if init_state is not None:
            part.init_state_fn = init_state
        part.init_state_fn(part.optimizer, part.config)


def _init_zeros(names: Sequence[str], optimizer: torch.optim.Optimizer, config: object = None) -> None:
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        for name in names:
            optimizer.state[parameter].setdefault(name, torch.zeros_like(parameter))


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers that megatron-core has chained, those of no parameter left out."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in chained if not getattr(part, "is_stub_optimizer", False) and part.optimizer is not None]
