"""The composition root: from a checked config to a `Run`. The only file that knows every room."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron_rb.app.session import open_session
from megatron_rb.capture.step_capture import StepCapture
from megatron_rb.checkpoint.fence import Fence
from megatron_rb.checkpoint.hf.side_files import copy_side_files
from megatron_rb.checkpoint.manager import CheckpointManager
from megatron_rb.checkpoint.sharded import TrainingState
from megatron_rb.config.derive import Derived, check_profile_end, derive, derive_steps
from megatron_rb.config.optimizers import OPTIMIZERS
from megatron_rb.config.schema import Config
from megatron_rb.data.build import RefusedRows, build_dataset, build_encoder
from megatron_rb.data.dataset import ConversationDataset
from megatron_rb.data.ledger import Ledger
from megatron_rb.metrics.heartbeat import Heartbeat
from megatron_rb.metrics.jsonl import skipped_updates
from megatron_rb.metrics.writers import METRICS_FILE, build_writers
from megatron_rb.models.kernel_report import report_of_run, taken_line
from megatron_rb.parallel.attempt import Attempt
from megatron_rb.parallel.collectives import rank_zero_first
from megatron_rb.parallel.session import Session
from megatron_rb.parallel.world import world_from_environment
from megatron_rb.planner.device import Peak
from megatron_rb.shapes.shape import load_shape, model_fingerprint
from megatron_rb.tasks.build import TaskData, build_task
from megatron_rb.train.build import Trainable, build_trainable
from megatron_rb.train.guard import UpdateGuard, not_finite_parameters
from megatron_rb.train.peak import known_peak
from megatron_rb.train.profiler import StepProfiler
from megatron_rb.train.run import Run, layout_state, seed_everything
from megatron_rb.train.schedule import LearningRateSchedule
from megatron_rb.train.step import Runner
from megatron_rb.train.timers import StepTimers

SamplesOf = Callable[[Config, Derived, Session, CheckpointManager], TaskData]


def assemble(config: Config, heartbeat: Heartbeat, attempt: Attempt, samples_of: SamplesOf | None = None) -> Run:
    """Check everything that can be checked, then build the run and restore its newest checkpoint, if there is one.

    Args:
        samples_of: makes the samples; None = reads the files of `data`.

    Raises:
        ValueError: settings, data, weights or checkpoint do not fit.
    """
    derived = derive(config, load_shape(config.model.hf_path), world_from_environment()[2])
    session = open_session(config)
    profiler = _profiler(config, derived, session)  # first, so that a history of memory is whole
    peak = known_peak(session.platform, config.model.dtype, config.metrics.peak_tflops)
    _log_start(config, derived, session, peak)
    checkpoints = _checkpoints(config, derived, attempt)
    samples = (samples_of or _samples)(config, derived, session, checkpoints)
    train_steps = derive_steps(
        config.schedule, config.data, len(samples.training), int(samples.training.sizes[:, 0].sum())
    )
    check_profile_end(config.metrics.profile, train_steps)
    seed_everything(config.seed, session.platform)
    trainable = build_trainable(session, config, derived.init)
    schedule = LearningRateSchedule(trainable.optimizer, config.optimizer, config.schedule, train_steps)
    task = build_task(config, derived, Runner(trainable.chunks, session), samples)
    state = TrainingState(
        chunks=trainable.chunks,
        optimizer=trainable.optimizer,
        parts={"schedule": schedule, "data": task},
        model=model_fingerprint(session.shape) | trainable.identity,
        layout=layout_state(session, config.parallel.sequence_parallel),
        platform=session.platform,
        reseed=lambda step: seed_everything(config.seed + step, session.platform),
        notes=trainable.notes,
    )
    first_step = _resume(config, checkpoints, state, train_steps)
    _check_weights(trainable, derived.init if not first_step else str(derived.checkpoint_dir))
    first = session.mesh.rank == 0
    if first:
        copy_side_files(config.model.hf_path, derived.checkpoint_dir / "hf")
    modules = [chunk.module for chunk in trainable.chunks]
    return Run(
        config,
        session,
        trainable.chunks,
        trainable.optimizer,
        schedule,
        task,
        checkpoints,
        build_writers(config.metrics, derived.run_dir, train_steps, first_step, first),
        train_steps,
        state,
        heartbeat,
        StepTimers(modules, session.platform, config.metrics.compare_ranks_every),
        _capture(config, derived, session, trainable),
        UpdateGuard(config.optimizer.max_bad_steps, skipped_updates(derived.run_dir / METRICS_FILE) if first else 0),
        profiler,
        peak,
        step=first_step,
        saved_step=first_step if first_step else -1,
    )


def _checkpoints(config: Config, derived: Derived, attempt: Attempt) -> CheckpointManager:
    settings = config.checkpoint
    fence = Fence(attempt.id, attempt.fence) if attempt.fence is not None else None
    return CheckpointManager(derived.checkpoint_dir, settings.keep_last, settings.asynchronous, fence=fence)


def _capture(config: Config, derived: Derived, session: Session, trainable: Trainable) -> StepCapture:
    settings = config.metrics.capture
    folder = Path(settings.dir) if settings.dir else derived.run_dir / "captures"
    description = {
        "model": model_fingerprint(session.shape),
        "dtype": config.model.dtype,
        "platform": session.platform.info(),
        "kernels": vars(config.kernels),
        "layers": config.model.layers,
        "layout": layout_state(session, config.parallel.sequence_parallel),
    }
    return StepCapture(settings, folder, [chunk.module for chunk in trainable.chunks], session.mesh, description)


def _samples(config: Config, derived: Derived, session: Session, checkpoints: CheckpointManager) -> TaskData:
    """Training and held-out samples; rank 0 looks at every row, the others read its index."""
    if not config.data.train:
        raise ValueError("data.train is empty; name at least one jsonl file of conversations")
    ledger = Ledger(derived.run_dir / "ledger.jsonl", session.mesh.rank)
    build = partial(
        build_dataset,
        config.data,
        build_encoder(config.data, config.model.hf_path, session.shape),
        ledger=ledger,
        cache_dir=derived.run_dir / "index",
        progress=session.mesh.rank == 0 and config.metrics.progress,
        refused=_refused_rows(config, checkpoints.latest(), session.mesh.rank),
    )

    def build_all() -> tuple[ConversationDataset, ConversationDataset | None]:
        return build(config.data.train), build(config.data.evaluation) if config.data.evaluation else None

    return TaskData(*rank_zero_first(build_all), ledger)


def _refused_rows(config: Config, newest: int | None, rank: int) -> RefusedRows:
    """Rows refused for their media are looked at again on one rank, and taken in where no checkpoint counts on them."""
    if rank:
        return "leave"
    return "tell" if newest is not None and not config.data.allow_changed else "again"


def _resume(config: Config, checkpoints: CheckpointManager, state: TrainingState, train_steps: int) -> int:
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
    if newest > train_steps:
        raise ValueError(
            f"{checkpoints.folder} holds a checkpoint of step {newest} and the settings ask for {train_steps} steps "
            f"(schedule); ask for {newest} or more, or choose another run_dir"
        )
    return checkpoints.load(state).step


def _check_weights(trainable: Trainable, origin: str) -> None:
    """Refuse to train on weights that are not finite; every rank looks at its own."""
    bad = not_finite_parameters(trainable.chunks)
    if bad:
        raise ValueError(
            f"{len(bad)} tensors of {origin} hold NaN or infinity, the first is {bad[0]}; train from weights without"
        )


def _log_start(config: Config, derived: Derived, session: Session, peak: Peak | None) -> None:
    """Say what runs where; settings whose kernels cannot run here are refused on every rank."""
    kernels = taken_line(report_of_run(config, session.platform, session.shape))
    mesh, platform = session.mesh, session.platform
    if mesh.rank:
        return
    print(
        f"{config.name}: {platform.name}, {mesh.world_size} processes = tp {mesh.tp_size} x pp {mesh.pp_size} x "
        f"{f'cp {mesh.cp_size} x ' if mesh.cp_size > 1 else ''}dp {mesh.dp_size}, layout {session.layout}, run folder "
        f"{Path(derived.run_dir)}\n{kernels}\n{_optimizer_words(config)}; MFU is a share of {_peak_words(peak)}",
        flush=True,
    )


def _profiler(config: Config, derived: Derived, session: Session) -> StepProfiler:
    settings = config.metrics.profile
    folder = Path(settings.dir) if settings.dir else derived.run_dir / "profile"
    return StepProfiler(settings, folder, session.mesh.rank, session.platform)


def _optimizer_words(config: Config) -> str:
    traits = OPTIMIZERS[config.optimizer.name]
    shared = ", shared out among data-parallel ranks" if config.parallel.distributed_optimizer else ""
    kept = f"{traits.state_bytes} bytes of state per trained parameter"
    return f"optimizer {config.optimizer.name} ({traits.title}): {kept}{shared}"


def _peak_words(peak: Peak | None) -> str:
    if peak is None:
        return "nothing, the peak of this device is not known (metrics.peak_tflops states it)"
    return f"{peak.flops / 1e12:.4g} TFLOP/s ({peak.source})"
