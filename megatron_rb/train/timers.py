"""Timers of the sections of a step, once in a while on this rank; in all other steps they cost nothing but a test."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_rb.metrics.stragglers import SECTIONS, RankRecord, RankTimes
from megatron_rb.parallel.mesh import Mesh
from megatron_rb.platform import Platform


class StepTimers:
    """Times the forward passes of vision and language blocks in every `every`-th step.

    Args:
        modules: the model chunks of this rank.
        every: steps between measurements; 0 = none.
    """

    def __init__(self, modules: Sequence[torch.nn.Module], platform: Platform, every: int) -> None:
        self.platform = platform
        self.every = every
        self.active = False
        self.seconds = dict.fromkeys(SECTIONS, 0.0)
        self._started = 0.0
        for name, block in _blocks(modules) if every else ():
            block.register_forward_pre_hook(self._enter)
            block.register_forward_hook(lambda *_, section=name: self._leave(section))

    def begin_step(self, step: int) -> None:
        """`step` optimizer steps are done; the one that begins now is measured when it is due."""
        self.active = self.every > 0 and (step + 1) % self.every == 0
        self.seconds = dict.fromkeys(SECTIONS, 0.0)

    def add(self, section: str, seconds: float) -> None:
        self.seconds[section] += seconds

    def gather(self, step: int, step_seconds: float, mesh: Mesh) -> RankRecord:
        """The times of all ranks; every rank calls this after a measured step."""
        own = torch.tensor([float(mesh.pp_rank), *self.seconds.values()], dtype=torch.float64)
        rows = [torch.empty_like(own) for _ in range(mesh.world_size)]
        dist.all_gather(rows, own)
        ranks = []
        for rank, row in enumerate(rows):
            peers, *seconds = row.tolist()
            ranks.append(RankTimes(rank, int(peers), dict(zip(SECTIONS, seconds, strict=True))))
        return RankRecord(step, step_seconds, ranks)

    def _enter(self, *_: object) -> None:
        if self.active:
            self.platform.synchronize()
            self._started = time.perf_counter()

    def _leave(self, section: str) -> None:
        if self.active:
            self.platform.synchronize()
            self.seconds[section] += time.perf_counter() - self._started


def _blocks(modules: Sequence[torch.nn.Module]) -> list[tuple[str, torch.nn.Module]]:
    """The blocks of the layout that these chunks hold, each with its section."""
    found = []
    for module in modules:
        for name in ("vision", "language"):
            for child in module.get_submodule(name).children() if hasattr(module, name) else ():
                blocks = child.children() if isinstance(child, torch.nn.ModuleDict) else (child,)
                found += [(name, block) for block in blocks]
    return found
