"""All values that follow from settings, model sizes and number of processes, computed and checked in one pass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_rb.config.adapters import check_adapters
from megatron_rb.config.optimizers import check_optimizer
from megatron_rb.config.rules import either
from megatron_rb.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    ProfileConfig,
    RecomputeConfig,
    ScheduleConfig,
)
from megatron_rb.layout import PipelineLayout, parse_layout
from megatron_rb.layout.token_axis import token_multiple


class DivisibleVision(Protocol):
    """What `derive` reads of a ViT."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...


class DivisibleText(Protocol):
    """What `derive` reads of a language model."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_query_groups(self) -> int: ...
    @property
    def ffn_hidden_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...


class DivisibleModel(Protocol):
    """What `derive` reads of a model; a `RoboBrainShape` is one."""

    @property
    def vision(self) -> DivisibleVision: ...
    @property
    def text(self) -> DivisibleText: ...


@dataclass(frozen=True)
class Derived:
    """Values that other rooms would otherwise compute a second time."""

    world_size: int
    tp_size: int
    pp_size: int
    cp_size: int
    dp_size: int
    processes_per_node: int
    layout: PipelineLayout | None
    """The layout the user wrote; None = to be balanced by cost."""
    micro_batch_multiple: int
    """The number of micro-batches of a data-parallel rank is a multiple of this (interleaved 1F1B needs pp_size)."""
    sequence_parallel: bool
    """False at tp_size 1, where there is nothing to split."""
    token_multiple: int
    """The number of tokens of a micro-batch is a multiple of this."""
    run_dir: Path
    checkpoint_dir: Path
    init: str
    """Where the weights of a new run come from: a folder, or `random`."""
    tokenizer: str


def derive(config: Config, shape: DivisibleModel, world_size: int = 0) -> Derived:
    """Compute everything that depends on more than one setting.

    Args:
        world_size: processes that really run (as torchrun or srun say); 0 = what the config asks for.

    Raises:
        ValueError: settings, model and processes do not fit together.
    """
    parallel = config.parallel
    if parallel.auto:
        raise ValueError(
            "parallel=auto is planned by `rb launch`; give a layout here, or settings=FILE of `rb plan --yaml FILE`"
        )
    check_optimizer(config)
    check_tp_size(parallel.tp_size, shape)
    layout = written_layout(parallel, shape)
    _check_recompute(config.model.recompute, layout.num_slices if layout is not None else parallel.pp_size)
    world_size = _world_size(config, world_size)
    dp_size = world_size // replica_size(parallel)
    sequence_parallel = parallel.sequence_parallel and parallel.tp_size > 1
    multiple = parallel.pp_size if layout is not None and layout.vpp_size > 1 else 1
    _check_step_size(config.data, dp_size, multiple)
    tokens = token_multiple(parallel.cp_size, parallel.tp_size if sequence_parallel else 1)
    _check_data(config.data, parallel, tokens)
    _check_capture(config.metrics.capture.every, parallel.cp_size)
    _check_profile(config.metrics.profile, world_size, config.schedule.train_steps)
    _check_layers(config.model)
    check_adapters(config)
    run_dir = Path(config.run_dir)
    return Derived(
        world_size=world_size,
        tp_size=parallel.tp_size,
        pp_size=parallel.pp_size,
        cp_size=parallel.cp_size,
        dp_size=dp_size,
        processes_per_node=_processes_per_node(config, world_size),
        layout=layout,
        micro_batch_multiple=multiple,
        sequence_parallel=sequence_parallel,
        token_multiple=tokens,
        run_dir=run_dir,
        checkpoint_dir=Path(config.checkpoint.dir) if config.checkpoint.dir else run_dir / "checkpoints",
        init=config.checkpoint.init or config.model.hf_path,
        tokenizer=config.data.tokenizer or config.model.hf_path,
    )


def derive_steps(schedule: ScheduleConfig, data: DataConfig, num_samples: int, num_tokens: int) -> int:
    """Optimizer steps of the run; a step may cross the end of an epoch, so only the last step of the run is rounded up.

    Args:
        num_samples, num_tokens: of the training data.

    Raises:
        ValueError: the run would have no step, since there is no sample; or epochs of filled micro-batches, whose
            number of steps is not known before they are filled.
    """
    if num_samples < 1:
        raise ValueError("there is no usable training sample; check data.train and the ledger of skipped samples")
    if schedule.train_steps:
        return schedule.train_steps
    if data.global_micro_batches:
        steps = math.ceil(schedule.epochs * num_tokens / (data.global_micro_batches * data.seq_length))
        raise ValueError(
            f"data.global_micro_batches {data.global_micro_batches} puts a varying number of samples into a step, so "
            f"{schedule.epochs:g} epochs are no fixed number of steps; set schedule.train_steps (at least {steps}, "
            f"going by {num_tokens} tokens and seq_length {data.seq_length})"
        )
    return math.ceil(schedule.epochs * num_samples / data.global_batch_size)


def check_profile_end(profile: ProfileConfig, train_steps: int) -> None:
    """Raise ValueError for a step to be profiled that the run does not have."""
    late = [step for step in profile.steps if step > train_steps]
    if late:
        raise ValueError(f"metrics.profile.steps names step {late[0]}; the run has {train_steps} steps")


def check_tp_size(tp_size: int, shape: DivisibleModel) -> None:
    """Every size that tensor parallelism cuts must be a multiple of tp_size; the ViT's ffn need not, it is padded.

    Raises:
        ValueError: names the first size that is not, and the degrees that this model allows.
    """
    sizes = {
        "num_query_groups": shape.text.num_query_groups,
        "num_attention_heads": shape.text.num_heads,
        "vision num_heads": shape.vision.num_heads,
        "text ffn_hidden_size": shape.text.ffn_hidden_size,
        "vocab_size": shape.text.vocab_size,
    }
    common = math.gcd(*sizes.values())
    for name, size in sizes.items():
        if size % tp_size:
            allowed = [str(n) for n in range(1, common + 1) if common % n == 0]
            raise ValueError(f"tp_size {tp_size} does not divide {name} {size}; use {either(allowed)}")


def replica_size(parallel: ParallelConfig) -> int:
    """Processes that together run one micro-batch; the others are data parallel to them.

    Raises:
        ValueError: a degree is below 1.
    """
    for name in ("tp_size", "pp_size", "cp_size"):
        if getattr(parallel, name) < 1:
            raise ValueError(f"{name} is {getattr(parallel, name)}; it must be at least 1")
    return parallel.tp_size * parallel.pp_size * parallel.cp_size


def _replica_text(parallel: ParallelConfig) -> str:
    context = f" x cp_size {parallel.cp_size}" if parallel.cp_size > 1 else ""
    return f"tp_size {parallel.tp_size} x pp_size {parallel.pp_size}{context}"


def written_layout(parallel: ParallelConfig, shape: DivisibleModel) -> PipelineLayout | None:
    """The layout that `parallel.layout` says; None = none, it is to be balanced.

    Raises:
        ValueError: the model has too few blocks, or the text is no layout of it.
    """
    num_blocks = shape.vision.num_layers + shape.text.num_layers + 4
    if parallel.pp_size > num_blocks:
        raise ValueError(
            f"pp_size {parallel.pp_size} is more than the {num_blocks} blocks of the model; use a smaller pp_size"
        )
    if not parallel.layout.strip():
        return None
    return parse_layout(parallel.layout, shape.vision.num_layers, shape.text.num_layers, parallel.pp_size)


def _check_recompute(recompute: RecomputeConfig, num_slices: int) -> None:
    for name in ("vision_per_slice", "language_per_slice"):
        values = getattr(recompute, name)
        if values and len(values) != num_slices:
            raise ValueError(
                f"model.recompute.{name} has {len(values)} entries, the layout has {num_slices} slices; "
                f"give one number for each slice"
            )
        if any(value < -1 for value in values):
            raise ValueError(f"model.recompute.{name} holds {min(values)}; the smallest is -1, for all layers")


def _world_size(config: Config, world_size: int) -> int:
    cell = replica_size(config.parallel)
    wanted = config.world_size or config.cluster.nodes * config.cluster.processes_per_node
    if world_size and config.world_size and world_size != config.world_size:
        raise ValueError(
            f"{world_size} processes were started, the config asks for world_size {config.world_size}; "
            f"start {config.world_size}, or set world_size=0"
        )
    result = world_size or wanted or cell
    if result % cell:
        below = result // cell * cell
        sizes = f"{below} or {below + cell}" if below else str(cell)
        raise ValueError(
            f"world_size {result} is not a multiple of {_replica_text(config.parallel)} = {cell}; "
            f"use {sizes} processes, or other degrees"
        )
    return result


def _processes_per_node(config: Config, world_size: int) -> int:
    nodes, given = config.cluster.nodes, config.cluster.processes_per_node
    if given and given * nodes != world_size:
        raise ValueError(
            f"cluster.nodes {nodes} x processes_per_node {given} is {nodes * given}, the world has {world_size} "
            f"processes; set processes_per_node=0 to have it computed"
        )
    if world_size % nodes:
        raise ValueError(f"{world_size} processes cannot be spread evenly over {nodes} nodes; change world_size")
    return world_size // nodes


def _check_step_size(data: DataConfig, dp_size: int, multiple: int) -> None:
    count = data.global_micro_batches
    if count % (dp_size * multiple):
        cell = dp_size * multiple
        sizes = f"{count // cell * cell} or {count // cell * cell + cell}" if count > cell else str(cell)
        raise ValueError(
            f"data.global_micro_batches {count} is not a multiple of {dp_size} data-parallel ranks"
            f"{f' x pp_size {multiple} (interleaved stages)' if multiple > 1 else ''}; use {sizes}"
        )
    if not count and data.global_batch_size < dp_size:
        raise ValueError(
            f"global_batch_size {data.global_batch_size} leaves some of the {dp_size} data-parallel ranks without a "
            f"sample; use at least {dp_size}"
        )


def _check_layers(model: ModelConfig) -> None:
    if model.layers == "transformer_engine" and model.dtype == "fp32":
        raise ValueError(
            "model.layers=transformer_engine with model.dtype=fp32: Transformer Engine has no attention over packed "
            "sequences in fp32; use model.dtype=bf16 or model.layers=local"
        )


def _check_profile(profile: ProfileConfig, world_size: int, train_steps: int) -> None:
    steps = [step for step in profile.steps if step < 1]
    if steps:
        raise ValueError(f"metrics.profile.steps names step {steps[0]}; the first step of a run is 1")
    check_profile_end(profile, train_steps or max(profile.steps, default=0))
    ranks = [rank for rank in profile.ranks if not 0 <= rank < world_size]
    if ranks and (profile.steps or profile.memory):
        raise ValueError(f"metrics.profile.ranks names rank {ranks[0]}; the run has ranks 0 to {world_size - 1}")


def _check_capture(every: int, cp_size: int) -> None:
    if every and cp_size > 1:
        raise ValueError(
            f"metrics.capture.every {every} with cp_size {cp_size}: captures take rows of whole samples, and context "
            f"parallelism cuts samples; use cp_size 1 for a run that is captured"
        )


def _check_data(data: DataConfig, parallel: ParallelConfig, multiple: int) -> None:
    if data.seq_length % multiple:
        nearest = max(1, data.seq_length // multiple) * multiple
        reason = f"tp_size {multiple}, as sequence_parallel needs"
        if parallel.cp_size > 1:
            rows = f" with sequence_parallel over tp_size {parallel.tp_size}" if parallel.sequence_parallel else ""
            reason = f"{multiple}, as cp_size {parallel.cp_size}{rows} needs"
        raise ValueError(f"seq_length {data.seq_length} is not a multiple of {reason}; use {nearest}")
    if data.max_pixels and data.min_pixels > data.max_pixels:
        raise ValueError(f"min_pixels {data.min_pixels} is above max_pixels {data.max_pixels}")
