"""One rank of a run, rehearsed: its start, its steps, and what was seen on the way."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist

from megatron_rb.app.assemble import assemble
from megatron_rb.checkpoint.manager import CheckpointManager
from megatron_rb.config.derive import Derived
from megatron_rb.config.schema import Config
from megatron_rb.data.ledger import Ledger
from megatron_rb.metrics.heartbeat import Heartbeat
from megatron_rb.parallel.attempt import Attempt
from megatron_rb.parallel.groups import destroy_groups
from megatron_rb.parallel.session import Session
from megatron_rb.planner.histogram import load_histogram
from megatron_rb.rehearsal.checkpoint import MovedBytes, rehearse_load, rehearse_save
from megatron_rb.rehearsal.device import DEVICES, Waits
from megatron_rb.rehearsal.job import RehearsalJob
from megatron_rb.rehearsal.launches import Launches
from megatron_rb.rehearsal.memory import Allocation, DeviceMemory, MemoryPeak, by_site
from megatron_rb.rehearsal.messages import Messages
from megatron_rb.rehearsal.records import KINDS, LINES, PeakMemory, Phase, RehearsedRank
from megatron_rb.rehearsal.samples import UnpaintedSamples
from megatron_rb.rehearsal.sites import short_name
from megatron_rb.rehearsal.watch import Watch
from megatron_rb.tasks.build import TaskData
from megatron_rb.train.guard import optimizer_tensors
from megatron_rb.train.loop import take_step
from megatron_rb.train.run import Run
from megatron_rb.train.task import StepBatches

HELD_OUT = 16
"""Samples of an evaluation."""
FIRST_WORDS = 400
"""Characters of an error that are kept."""


@dataclass(frozen=True)
class Instruments:
    """What watches a rank."""

    memory: DeviceMemory
    waits: Waits
    messages: Messages
    launches: Launches
    watch: Watch

    def restart(self) -> None:
        for each in (self.memory, self.waits, self.messages, self.launches, self.watch):
            each.restart()


def rehearse_rank(config: Config, job: RehearsalJob, rank: int, tools: Instruments) -> RehearsedRank:
    """The start and some steps of one rank of a run, then what else is asked for."""
    environment = {"RANK": rank, "LOCAL_RANK": rank % DEVICES, "WORLD_SIZE": job.world_size, "MASTER_ADDR": "rehearsal"}
    environment["TORCHELASTIC_USE_AGENT_STORE"] = True  # the store is not this process's to make
    os.environ.update({name: str(value) for name, value in environment.items()})
    stages = []
    with tools.watch:
        start = _Stage("start", tools)
        run = assemble(config, Heartbeat(None, None, rank), Attempt("", None, None, None), partial(_samples, job))
        stages.append(start.end())
        sizes, failure = _note_sizes(run), ""
        for number in range(job.steps):
            sizes.clear()
            step = _Stage(f"step {number + 1}", tools)
            failure = _failure_of(partial(take_step, run))
            stages.append(step.end())
            if failure:
                break
        if job.evaluation and not failure:
            evaluation = _Stage("evaluation", tools)
            failure = _failure_of(run.evaluate)
            stages.append(evaluation.end())
        moved = MovedBytes()
        save, load = partial(rehearse_save, run.state, moved), partial(rehearse_load, run.state, moved, tools.watch)
        for name, action in (("save", save), ("load", load)) if job.checkpoint else ():
            if not failure:
                stage = _Stage(name, tools)
                failure = _failure_of(action)
                stages.append(stage.end())
        held = held_tensors(run)
        record = RehearsedRank(
            rank,
            run.mesh.name,
            run.mesh.pp_rank,
            list(tools.messages.groups.values()),
            [stage.phase(tools, held) for stage in stages],
            list(sizes),
            failure,
            moved.record() if job.checkpoint else None,
        )
        run.close()
        _leave(tools)
    return record


def _failure_of(action: Callable[[], object]) -> str:
    """What an action fails with and where, empty when it does not."""
    try:
        action()
    except Exception as error:  # whatever would end the process on its device
        frames = [frame for frame, _ in traceback.walk_tb(_first_cause(error).__traceback__)]
        lines = [f"{name}:{frame.f_lineno}" for frame in frames if (name := short_name(frame.f_code))]
        return f"{type(error).__name__}: {' '.join(str(error).split())[:FIRST_WORDS]} ({lines[-1]})"
    return ""


def _first_cause(error: BaseException) -> BaseException:
    """What an error was raised from: one of a rank is raised once more on all of them."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _samples(
    job: RehearsalJob, config: Config, derived: Derived, session: Session, checkpoints: CheckpointManager
) -> TaskData:
    ledger = Ledger(derived.run_dir / "ledger.jsonl", session.mesh.rank)
    histogram = load_histogram(job.histogram) if job.histogram else None
    held_out = replace(job.mix, samples=HELD_OUT, seed=job.mix.seed + 1)
    return TaskData(
        UnpaintedSamples(job.mix, session.shape, histogram),
        UnpaintedSamples(held_out, session.shape, histogram) if job.evaluation else None,
        ledger,
    )


def _note_sizes(run: Run) -> list[tuple[int, int]]:
    """A list that gets the sizes of the micro-batches of every step."""
    sizes: list[tuple[int, int]] = []
    next_step = run.task.next_step

    def noted() -> StepBatches:
        step = next_step()
        sizes.extend((batch.text.num_tokens, batch.vision.num_patches) for batch in step.micro_batches)
        return step

    run.task.next_step = noted  # type: ignore[method-assign]
    return sizes


def held_tensors(run: Run) -> dict[str, list[torch.Tensor]]:
    """What a training process holds between steps, by kind."""
    buffers = [buffer for chunk in run.chunks for buffer in chunk.buffers]
    weights = [parameter.data for chunk in run.chunks for parameter in chunk.parameters()]
    return {
        "weights": weights + [buffer.param_data for buffer in buffers if buffer.param_data is not None],
        "gradients": [buffer.grad_data for buffer in buffers],
        "optimizer": list(optimizer_tensors(run.optimizer)),
    }


class _Stage:
    """Counts what happens between its making and its end."""

    def __init__(self, name: str, tools: Instruments) -> None:
        self.name, self._tools, self._start = name, tools, time.process_time()
        tools.restart()

    def end(self) -> _Stage:
        tools = self._tools
        self.seconds = time.process_time() - self._start
        self.peak = tools.memory.peak
        self.waits, self.messages = tools.waits.seen, list(tools.messages.log)
        self.operations, arithmetic = tools.watch.operations, tools.watch.arithmetic
        self.flops, self.uncounted = arithmetic.flops, arithmetic.uncounted.total()
        self.launches = tools.launches.seen
        return self

    def phase(self, tools: Instruments, held: dict[str, list[torch.Tensor]]) -> Phase:
        return Phase(
            self.name,
            peak_memory(self.peak, {kind: tools.memory.blocks_of(tensors) for kind, tensors in held.items()}),
            [(kind, line, count) for (kind, line), count in self.waits.most_common()],
            self.messages,
            self.operations,
            self.flops,
            self.uncounted,
            dict(self.launches),
            self.seconds,
        )


def peak_memory(peak: MemoryPeak, held: Mapping[str, Set[Allocation]]) -> PeakMemory:
    """What a peak was made of.

    Args:
        held: by kind what lives from step to step.
    """
    kinds: dict[str, list[Allocation]] = {kind: [] for kind in KINDS}
    for block in peak.blocks:
        kind = next((kind for kind, blocks in held.items() if block in blocks), None)
        kinds[kind or ("temporary" if block.backward else "activations")].append(block)
    lines = [(kind, line, size) for kind, blocks in kinds.items() for line, size in by_site(blocks).items()]
    return PeakMemory(
        peak.size,
        {kind: sum(block.size for block in blocks) for kind, blocks in kinds.items()},
        sorted(lines, key=lambda line: -line[2])[:LINES],
    )


def _leave(tools: Instruments) -> None:
    """Forget the groups of this rank, so that another one can be rehearsed in this process."""
    destroy_groups()
    dist.destroy_process_group()
    tools.messages.groups.clear()
