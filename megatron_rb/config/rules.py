"""What each setting may be on its own; rules between settings, model and cluster are in `derive`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

from megatron_rb.config.optimizers import OPTIMIZERS
from megatron_rb.config.schema import Config

CHOICES: dict[str, tuple[str, ...]] = {
    "model.dtype": ("bf16", "fp32"),
    "model.layers": ("auto", "local", "transformer_engine"),
    "kernels.mrope": ("auto", "triton", "torch"),
    "kernels.window_attention": ("auto", "triton", "torch"),
    "kernels.varlen_attention": ("auto", "flash_attn_3", "flash_attn", "flash_attn_4", "torch_varlen", "torch"),
    "kernels.dynamic_padding": ("auto", "triton", "torch"),
    "kernels.linear_cross_entropy": ("auto", "liger", "torch"),
    "kernels.rms_norm": ("auto", "liger", "torch"),
    "kernels.swiglu": ("auto", "liger", "torch"),
    "data.padding": ("auto", "buckets", "none"),
    "data.verify": ("header", "decode"),
    "data.loss_turns": ("all", "last"),
    "data.box_text": ("tokens", "list"),
    "optimizer.name": tuple(OPTIMIZERS),
    "schedule.decay": ("cosine", "linear", "constant"),
    "task.name": ("sft", "value"),
    "cluster.name": ("local", "ssh", "slurm"),
    "cluster.launcher": ("auto", "direct", "srun", "torchrun", "ft_launcher"),
    "cluster.slurm.container_runtime": ("pyxis", "apptainer"),
}

# Smallest allowed value.
LEAST: dict[str, float] = {
    "world_size": 0,
    "model.recompute.vision": -1,
    "model.recompute.language": -1,
    "parallel.tp_size": 1,
    "parallel.pp_size": 1,
    "parallel.cp_size": 1,
    "planner.max_memory": 0,
    "platform.threads_per_rank": 0,
    "data.seq_length": 1,
    "data.max_patches": 1,
    "data.padding_buckets": 1,
    "data.global_batch_size": 1,
    "data.global_micro_batches": 0,
    "data.min_pixels": 0,
    "data.max_pixels": 0,
    "data.max_video_frames": 1,
    "data.read_seconds": 0,
    "data.prefetch_steps": 0,
    "data.decode_threads": 1,
    "optimizer.lr": 0,
    "optimizer.min_lr": 0,
    "optimizer.vision_lr_ratio": 0,
    "optimizer.merger_lr_ratio": 0,
    "optimizer.weight_decay": 0,
    "optimizer.clip_grad": 0,
    "optimizer.max_bad_steps": 1,
    "schedule.train_steps": 0,
    "schedule.eval_every": 0,
    "checkpoint.save_every": 0,
    "checkpoint.keep_last": 0,
    "metrics.log_every": 1,
    "metrics.compare_ranks_every": 0,
    "metrics.peak_tflops": 0,
    "metrics.capture.every": 0,
    "metrics.capture.limit": 1,
    "metrics.capture.samples": 1,
    "metrics.capture.rows": 1,
    "metrics.capture.context": 1,
    "metrics.capture.features": 1,
    "cluster.nodes": 1,
    "cluster.processes_per_node": 0,
    "cluster.spare_nodes": 0,
    "cluster.max_retries": 0,
    "cluster.return_seconds": 0,
    "cluster.slurm.gpus_per_node": -1,
    "cluster.slurm.cpus_per_task": 0,
    "cluster.slurm.warning_seconds": 0,
    "cluster.slurm.array_limit": 0,
    "cluster.ssh.fan_out": 1,
    "cluster.grace_seconds": 0,
    "cluster.least_hang_seconds": 0,
}

ABOVE_ZERO = (
    "parallel.timeout_minutes",
    "data.video_fps",
    "optimizer.eps",
    "schedule.epochs",
    "cluster.silence_seconds",
    "cluster.hang_seconds",
    "cluster.ssh.connect_seconds",
)
"""Quantities that make no sense at zero."""

# Lowest and highest allowed value.
RANGES: dict[str, tuple[float, float]] = {
    "schedule.warmup_ratio": (0, 1),
    "cluster.master_port": (0, 65535),
    "seed": (0, 2**63 - 1),
}

DECAYS = ("optimizer.beta1", "optimizer.beta2", "optimizer.momentum")
"""Shares that a running mean or sum keeps at each step: at 1 it would never forget, and the weights never recover."""


def check_values(config: Config) -> None:
    """Check every setting on its own.

    Raises:
        ValueError: the first setting with a value that cannot be meant.
    """
    _check_finite(dataclasses.asdict(config))
    for key, names in CHOICES.items():
        value = attrgetter(key)(config)
        if value not in names:
            raise ValueError(f"{key} '{value}' is not known; use {either(names)}")
    # "not >=" rather than "<", so that a NaN is refused too.
    for key, least in LEAST.items():
        value = attrgetter(key)(config)
        if not value >= least:
            raise ValueError(f"{key} is {value}; it must be at least {least:g}")
    for key in ABOVE_ZERO:
        value = attrgetter(key)(config)
        if not value > 0:
            raise ValueError(f"{key} is {value}; it must be above 0")
    for key, (low, high) in RANGES.items():
        value = attrgetter(key)(config)
        if not low <= value <= high:
            raise ValueError(f"{key} is {value}; it must lie between {low:g} and {high:g}")
    for key in DECAYS:
        value = attrgetter(key)(config)
        if not 0 <= value < 1:
            raise ValueError(f"{key} is {value}; it must be at least 0 and below 1")


def _check_finite(tree: Mapping[str, Any], prefix: str = "") -> None:
    for name, value in tree.items():
        if isinstance(value, dict):
            _check_finite(value, f"{prefix}{name}.")
        elif isinstance(value, float) and math.isinf(value):
            raise ValueError(f"{prefix}{name} is {value}; it must be a finite number")


def either(names: Sequence[str]) -> str:
    """`a`, or `a, b or c`, for a sentence that offers a choice."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
