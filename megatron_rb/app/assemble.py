"""The composition root: from a checked config to a `Run`. The only file that knows every room."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from megatron_rb.capture.step_capture import StepCapture
from megatron_rb.checkpoint.fence import Fence
from megatron_rb.checkpoint.hf.side_files import copy_side_files
from megatron_rb.checkpoint.manager import CheckpointManager
from megatron_rb.checkpoint.sharded import TrainingState
from megatron_rb.config.derive import Derived, derive, derive_steps
from megatron_rb.config.schema import Config
from megatron_rb.data.build import RefusedRows, build_dataset, build_encoder
from megatron_rb.data.dataset import ConversationDataset
from megatron_rb.data.ledger import Ledger
from megatron_rb.layout import PipelineLayout
from megatron_rb.metrics.heartbeat import Heartbeat
from megatron_rb.metrics.jsonl import skipped_updates
from megatron_rb.metrics.writers import METRICS_FILE, build_writers
from megatron_rb.models.build import DTYPES
from megatron_rb.models.kernel_report import kernel_report, taken_line
from megatron_rb.parallel.attempt import Attempt
from megatron_rb.parallel.groups import (
    Place,
    build_groups,
    cpu_threads_of_rank,
    rank_zero_first,
    start_process_group,
    world_from_environment,
)
from megatron_rb.platform import Platform
from megatron_rb.shapes.balance import default_layout
from megatron_rb.shapes.shape import RoboBrainShape, load_shape, model_fingerprint
from megatron_rb.tasks.build import build_task
from megatron_rb.train.build import Trainable, build_trainable
from megatron_rb.train.guard import UpdateGuard, not_finite_parameters
from megatron_rb.train.run import Run, layout_state, seed_everything
from megatron_rb.train.schedule import LearningRateSchedule
from megatron_rb.train.sections import SectionTimer
from megatron_rb.train.step import Runner
from megatron_rb.train.task import Task


def assemble(config: Config, platform: Platform, heartbeat: Heartbeat, attempt: Attempt) -> Run:
    """Check everything that can be checked, then build the run and restore its newest checkpoint, if there is one.

    Raises:
        ValueError: settings, data, weights or checkpoint do not fit.
    """
    shape = load_shape(config.model.hf_path)
    derived = derive(config, shape, world_from_environment()[2])
    layout = derived.layout or default_layout(shape, derived.pp_size)
    torch.set_num_threads(cpu_threads_of_rank(config.platform.threads_per_rank))
    platform.set_device(world_from_environment()[1])
    platform.require(DTYPES[config.model.dtype], "compute", "collective")
    platform.allow_tf32(config.platform.tf32)
    start_process_group(platform, config.parallel.timeout_minutes)
    timeout = config.parallel.timeout_minutes
    place = build_groups(derived.tp_size, derived.pp_size, layout.vpp_size, timeout, config.seed, derived.cp_size)
    rows = kernel_report(
        platform,
        DTYPES[config.model.dtype],
        config.model.layers,
        vars(config.kernels),
        shape.text.head_dim,
        (shape.vision.head_dim, 0),
    )
    _log_start(config, derived, layout, place, platform, taken_line(rows))
    ledger = Ledger(derived.run_dir / "ledger.jsonl", place.rank)
    checkpoints = CheckpointManager(
        derived.checkpoint_dir,
        config.checkpoint.keep_last,
        config.checkpoint.asynchronous,
        fence=Fence(attempt.id, attempt.fence) if attempt.fence is not None else None,
    )
    training, evaluation = _datasets(config, derived, shape, ledger, place, checkpoints)
    train_steps = derive_steps(config.schedule, config.data, len(training), int(training.sizes[:, 0].sum()))
    seed_everything(config.seed, platform)
    trainable = build_trainable(config, shape, layout, place, platform, derived.init)
    schedule = LearningRateSchedule(trainable.optimizer, config.optimizer, config.schedule, train_steps)
    runner = Runner(trainable.chunks, shape, place, platform.current_device())
    task = build_task(config, derived, runner, training, evaluation, ledger, platform)
    state = _training_state(config, shape, layout, place, platform, trainable, schedule, task)
    first_step = _resume(config, checkpoints, state)
    _check_weights(trainable, derived.init if not first_step else str(derived.checkpoint_dir))
    if place.rank == 0:
        copy_side_files(config.model.hf_path, derived.checkpoint_dir / "hf")
    writer = build_writers(config.metrics, derived.run_dir, train_steps, first_step, place.rank == 0)
    skipped = skipped_updates(derived.run_dir / METRICS_FILE) if place.rank == 0 else 0
    sections = SectionTimer([chunk.module for chunk in trainable.chunks], platform, config.metrics.compare_ranks_every)
    return Run(
        config,
        place,
        platform,
        trainable.chunks,
        trainable.optimizer,
        schedule,
        task,
        checkpoints,
        writer,
        train_steps,
        state,
        heartbeat,
        sections,
        _capture(config, derived, shape, layout, place, platform, trainable),
        UpdateGuard(config.optimizer.max_bad_steps, skipped),
        step=first_step,
        saved_step=first_step if first_step else -1,
    )


def _capture(
    config: Config,
    derived: Derived,
    shape: RoboBrainShape,
    layout: PipelineLayout,
    place: Place,
    platform: Platform,
    trainable: Trainable,
) -> StepCapture:
    settings = config.metrics.capture
    folder = Path(settings.dir) if settings.dir else derived.run_dir / "captures"
    description = {
        "model": model_fingerprint(shape),
        "dtype": config.model.dtype,
        "platform": platform.info(),
        "kernels": vars(config.kernels),
        "layers": config.model.layers,
        "layout": layout_state(place, str(layout), config.parallel.sequence_parallel),
    }
    return StepCapture(settings, folder, [chunk.module for chunk in trainable.chunks], place, description)


def _datasets(
    config: Config,
    derived: Derived,
    shape: RoboBrainShape,
    ledger: Ledger,
    place: Place,
    checkpoints: CheckpointManager,
) -> tuple[ConversationDataset, ConversationDataset | None]:
    """Training and held-out samples; rank 0 looks at every row, the others read its index."""
    if not config.data.train:
        raise ValueError("data.train is empty; name at least one jsonl file of conversations")
    encoder = build_encoder(config.data, config.model.hf_path, shape)
    build = partial(
        build_dataset,
        config.data,
        encoder,
        ledger=ledger,
        cache_dir=derived.run_dir / "index",
        progress=place.rank == 0 and config.metrics.progress,
        refused=_refused_rows(config, checkpoints.latest(), place),
    )

    def build_all() -> tuple[ConversationDataset, ConversationDataset | None]:
        return build(config.data.train), build(config.data.evaluation) if config.data.evaluation else None

    return rank_zero_first(build_all)


def _refused_rows(config: Config, newest: int | None, place: Place) -> RefusedRows:
    """Rows refused for their media are looked at again on one rank, and taken in where no checkpoint counts on them."""
    if place.rank:
        return "leave"
    return "tell" if newest is not None and not config.data.allow_changed else "again"


def _training_state(
    config: Config,
    shape: RoboBrainShape,
    layout: PipelineLayout,
    place: Place,
    platform: Platform,
    trainable: Trainable,
    schedule: LearningRateSchedule,
    task: Task,
) -> TrainingState:
    return TrainingState(
        chunks=trainable.chunks,
        optimizer=trainable.optimizer,
        parts={"schedule": schedule, "data": task},
        model=model_fingerprint(shape),
        layout=layout_state(place, str(layout), config.parallel.sequence_parallel),
        platform=platform,
        reseed=lambda step: seed_everything(config.seed + step, platform),
    )


def _resume(config: Config, checkpoints: CheckpointManager, state: TrainingState) -> int:
    """Step the run continues from; 0 for a new run."""
    checkpoints.take_over()
    newest = checkpoints.latest()
    if newest is None:
        return 0
    if not config.checkpoint.resume:
        raise ValueError(
            f"{checkpoints.folder} holds a checkpoint of step {newest} and checkpoint.resume is false; "
            f"choose another run_dir for a new run, or resume"
        )
    return checkpoints.load(state).step


def _check_weights(trainable: Trainable, origin: str) -> None:
    """Refuse to train on weights that are not finite; every rank looks at its own."""
    bad = not_finite_parameters(trainable.chunks)
    if bad:
        raise ValueError(
            f"{len(bad)} tensors of {origin} hold NaN or infinity, the first is {bad[0]}; train from weights without"
        )


def _log_start(
    config: Config, derived: Derived, layout: PipelineLayout, place: Place, platform: Platform, kernels: str
) -> None:
    if place.rank:
        return
    print(
        f"{config.name}: {platform.name}, {place.world_size} processes = tp {place.tp_size} x pp {place.pp_size} x "
        f"{f'cp {place.cp_size} x ' if place.cp_size > 1 else ''}dp {place.dp_size}, layout {layout}, run folder "
        f"{Path(derived.run_dir)}\n{kernels}",
        flush=True,
    )
