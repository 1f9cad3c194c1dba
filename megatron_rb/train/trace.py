"""Timestamps of every forward and backward pass of a step, through the timers that megatron-core's schedules offer."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from megatron_rb.metrics.timeline import Span, StageTimeline
from megatron_rb.parallel.mesh import Mesh
from megatron_rb.platform import Platform
from megatron_rb.train.timers import StepTimers

KINDS = {"forward-compute": "forward", "backward-compute": "backward"}
"""Timers of megatron-core that are recorded; it has more, for messages and whole passes."""


class PassTracer:
    """Records the passes of one step. A traced step waits for the device at every border, so it is slower than others.

    Args:
        timers: times the forward passes of vision and language blocks meanwhile.
    """

    def __init__(
        self, chunks: Sequence[DistributedDataParallel], platform: Platform, mesh: Mesh, timers: StepTimers
    ) -> None:
        self.config = chunks[0].module.config
        self.platform, self.mesh, self.timers = platform, mesh, timers
        self.spans: list[Span] = []
        self.zero = 0.0

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Trace what the schedules do inside the block; every rank enters it together."""
        self.spans = []
        self.timers.begin_step(0)
        dist.barrier()
        self.zero = time.perf_counter()
        self.config.timers = self
        try:
            yield
        finally:
            self.config.timers = None
            self.timers.active = False

    def __call__(self, name: str, log_level: int = 0) -> _Timer:
        return _Timer(self, KINDS.get(name, ""))

    def timeline(self) -> StageTimeline:
        """What this rank did in the traced step."""
        mesh = self.mesh
        return StageTimeline(mesh.rank, mesh.pp_rank, mesh.first_pp_rank, tuple(self.spans))

    def enter(self, kind: str) -> float:
        """A pass begins: its moment."""
        # Blocks that are computed again run inside the backward pass and belong to it.
        self.timers.active = kind == "forward"
        return self.now()

    def now(self) -> float:
        self.platform.synchronize()
        return time.perf_counter() - self.zero


class _Timer:
    """One `timers(name).start()`, `.stop()`; each call of `timers` makes a new one, so the tracer keeps the start."""

    def __init__(self, tracer: PassTracer, kind: str) -> None:
        self.tracer, self.kind = tracer, kind

    def start(self, barrier: bool = False) -> None:
        if self.kind:
            self.tracer.spans.append(Span(self.kind, self.tracer.enter(self.kind), float("nan")))

    def stop(self, barrier: bool = False) -> None:
        if self.kind:
            begun = self.tracer.spans.pop()
            self.tracer.spans.append(Span(self.kind, begun.start, self.tracer.now()))
