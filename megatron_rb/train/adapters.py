"""Adapters of a run: which there are, their first values, and what is trained beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rb.checkpoint.hf.adapters import (
    PeftFolder,
    adapters_of_manifest,
    factor_rules,
    open_adapter,
    target_modules,
)
from megatron_rb.checkpoint.hf.digest import DigestingReader, combined_digest
from megatron_rb.checkpoint.hf.in_full import trained_in_full
from megatron_rb.checkpoint.hf.run_adapters import adapters_of_run
from megatron_rb.checkpoint.hf.table import WeightRule, weight_table
from megatron_rb.checkpoint.manager import load_weights
from megatron_rb.checkpoint.manifest import read_manifest
from megatron_rb.config.schema import ModelConfig
from megatron_rb.models.adapters.attach import attach_adapters, fresh_factors, is_factor
from megatron_rb.models.adapters.flops import adapted_flops
from megatron_rb.models.adapters.plan import Adapter
from megatron_rb.models.build import fill_weights, full_shapes, named_parameters, weight_key
from megatron_rb.models.stage import RoboBrainStage
from megatron_rb.models.work import Work, training_flops
from megatron_rb.parallel.session import Session
from megatron_rb.platform.planning_trees import gather_to_first, scatter_from_first
from megatron_rb.shapes.shape import RoboBrainShape, model_fingerprint


def fill_base(stages: list[RoboBrainStage], session: Session, folder: str) -> str:
    """Give stages the weights of a Hugging Face folder, which stay frozen; returns their digest."""
    reader = cache(partial(DigestingReader, folder, session.shape))
    fill_weights(stages, session.mesh, lambda name: reader().read(name))
    digests = reader().digests if reader.cache_info().currsize else {}
    if not session.mesh.groups:
        return combined_digest(digests)
    told = gather_to_first(digests)
    whole = None if told is None else combined_digest({name: each for part in told for name, each in part.items()})
    return scatter_from_first(None if whole is None else [whole] * dist.get_world_size())


def flops_of(settings: ModelConfig, shape: RoboBrainShape) -> Callable[[Work], float]:
    """Counts the operations that a step of some work needs at least, forward and backward."""
    if not settings.adapters:
        return lambda work: training_flops(shape, work, settings.freeze).total
    adapters, in_full = adapters_of_run(settings, shape), trained_in_full(settings.train_in_full, shape)
    return lambda work: adapted_flops(shape, work, adapters, in_full).total


def check_base(settings: ModelConfig, shape: RoboBrainShape, base: str) -> None:
    """Raise ValueError where a folder of peft says that it belongs to other base weights; those of other tools do not.

    Args:
        base: digest of the weights of this run.
    """
    for name, each in settings.adapters.items():
        digest = open_adapter(each.init, name, shape).digest if each.init else ""
        if digest and digest != base:
            raise ValueError(
                f"model.adapters.{name}.init: {each.init} belongs to other base weights ({digest}) than this run has "
                f"({base}); name the folder that it was trained on in checkpoint.init or model.hf_path"
            )


def add_adapters(stages: list[RoboBrainStage], session: Session, settings: ModelConfig, seed: int) -> None:
    """Attach the adapters of a run to stages that have their weights, and give them their first values."""
    adapters = adapters_of_run(settings, session.shape)
    attach_adapters(stages, adapters, session.device)
    fresh = fresh_factors(full_shapes(stages), seed)
    sources = _sources(settings, adapters, session.shape)

    def read(name: str) -> torch.Tensor:
        return sources[name]() if name in sources else fresh(name)

    fill_weights(stages, session.mesh, read, lambda name: is_factor(name) or name in sources)


def identity(settings: ModelConfig, shape: RoboBrainShape, base: str) -> dict[str, Any]:
    """What a checkpoint of adapters says beside the model's sizes: it opens with the same adapters on the same base.

    Args:
        base: digest of the frozen weights.
    """
    adapters = {
        adapter.name: {
            "modules": target_modules(adapter, shape),
            "rank": adapter.rank,
            "alpha": adapter.alpha,
            "rslora": adapter.rslora,
        }
        for adapter in adapters_of_run(settings, shape)
    }
    return {"base": base, "adapters": adapters, "train_in_full": sorted(settings.train_in_full)}


def _sources(
    settings: ModelConfig, adapters: Sequence[Adapter], shape: RoboBrainShape
) -> dict[str, Callable[[], torch.Tensor]]:
    """How to read what the run's folders of peft hold, by native name."""
    sources: dict[str, Callable[[], torch.Tensor]] = {}
    table = weight_table(shape)
    for adapter in adapters:
        folder = settings.adapters[adapter.name].init
        if not folder:
            continue
        opened = open_adapter(folder, adapter.name, shape)
        whole = {name: rule for name, rule in table.items() if set(rule.hf_names) & set(opened.in_full)}
        for name, rule in {**factor_rules(adapter, shape), **whole}.items():
            sources[name] = _reader(opened, rule)
    return sources


def _reader(opened: PeftFolder, rule: WeightRule) -> Callable[[], torch.Tensor]:
    return lambda: rule.join([opened.read(name) for name in rule.hf_names])


def load_adapted(stages: list[RoboBrainStage], session: Session, checkpoint: str, base: str = "") -> None:
    """Give stages the weights of a checkpoint of adapters, and those of the base that it names.

    Args:
        base: Hugging Face folder where the base weights lie now; empty = where the run found them.

    Raises:
        ValueError: the base is not there, or its weights are others.
    """
    manifest = read_manifest(checkpoint)
    model, folder = manifest["model"], base or manifest.get("base_folder", "")
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"the base weights of {checkpoint} were {folder}, which is not there")
    digest = fill_base(stages, session, folder)
    attach_adapters(stages, adapters_of_manifest(model, session.shape), session.device)
    train_adapters_only(stages, model["train_in_full"])
    own = {name: model[name] for name in ("adapters", "train_in_full")} | {"base": digest}
    load_weights(list(stages), model_fingerprint(session.shape) | own, checkpoint)


def train_adapters_only(stages: Sequence[RoboBrainStage], in_full: Sequence[str]) -> None:
    """Freeze everything but the factors of adapters and the modules that are trained in full."""
    shape = stages[0].shape
    full = trained_in_full(in_full, shape)
    for stage in stages:
        stage.stores_frozen = False
    for name, parameter in named_parameters(list(stages)):
        parameter.requires_grad_(is_factor(name) or weight_key(name, shape) in full)
