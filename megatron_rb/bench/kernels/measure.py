"""Times the kernels on a GPU as ratios to the copy bandwidth and matmul rate of the same run."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch

from megatron_rb.bench.kernels.cases import KernelCase, Pass, all_cases


@dataclass(frozen=True)
class MeasuredCase:
    """A measured case."""

    name: str
    bytes: int
    flops: int
    seconds: dict[str, float]
    """Median of each side; a side that cannot run here is missing."""
    peak_bytes: dict[str, int]
    """Device memory that each side holds at most, beyond what was there before."""
    copy_share: float
    matmul_share: float
    goal: float | None
    """Share of the copy bandwidth to reach."""
    at_least: dict[str, float]
    """How many times as fast as another side it should be."""
    failed: dict[str, str]
    """Sides that could not run, and why."""

    @property
    def speedups(self) -> dict[str, float]:
        return {name: time / self.seconds["ours"] for name, time in self.seconds.items() if name != "ours"}

    @property
    def reached(self) -> bool | None:
        """Whether every goal is met; None where there is none or a side of it could not run."""
        if self.goal is None:
            return None
        if any(name not in self.seconds for name in self.at_least):
            return None if self.copy_share >= self.goal else False
        return self.copy_share >= self.goal and all(
            self.speedups[name] >= times for name, times in self.at_least.items()
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"speedups": self.speedups, "reached": self.reached}


def measure_on_gpu(device: torch.device, repeats: int = 50) -> tuple[dict[str, float], list[MeasuredCase]]:
    """Ceilings measured here (`copy_bytes_per_second`, `matmul_flops_per_second`), and every case."""
    ceilings = _ceilings(device, repeats)
    return ceilings, [_measure(make(), ceilings, repeats) for make in all_cases(device)]


def _ceilings(device: torch.device, repeats: int) -> dict[str, float]:
    source = torch.empty(2**28, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    square = torch.randn(8192, 8192, dtype=torch.bfloat16, device=device)
    copy = _median(lambda number: target.copy_(source), repeats)
    matmul = _median(lambda number: square @ square, repeats)
    return {"copy_bytes_per_second": 2 * source.nbytes / copy, "matmul_flops_per_second": 2 * 8192**3 / matmul}


def _measure(case: KernelCase, ceilings: dict[str, float], repeats: int) -> MeasuredCase:
    seconds, peaks, failed = {}, {}, {}
    for name, side in case.sides.items():
        try:
            seconds[name] = _median(side, min(repeats, case.most_repeats))
            peaks[name] = _peak(side)
        except (ImportError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            if name == "ours":
                raise
            seconds.pop(name, None)
            failed[name] = (str(error).splitlines() or [type(error).__name__])[0]
    ours = seconds["ours"]
    return MeasuredCase(
        case.name,
        case.bytes,
        case.flops,
        seconds,
        peaks,
        copy_share=case.bytes / ours / ceilings["copy_bytes_per_second"],
        matmul_share=case.flops / ours / ceilings["matmul_flops_per_second"],
        goal=case.goal,
        at_least=case.at_least,
        failed=failed,
    )


def _median(run: Pass, repeats: int) -> float:
    """Median seconds on the device."""
    for number in range(5):
        run(number)
    marks = [[torch.Event(enable_timing=True) for _ in "ab"] for _ in range(repeats)]
    for number, (start, stop) in enumerate(marks):
        start.record()
        run(number)
        stop.record()
    torch.accelerator.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in marks) / 1e3


def _peak(run: Pass) -> int:
    before = torch.accelerator.memory_allocated()
    torch.accelerator.reset_peak_memory_stats()
    run(0)
    torch.accelerator.synchronize()
    return torch.accelerator.max_memory_allocated() - before
