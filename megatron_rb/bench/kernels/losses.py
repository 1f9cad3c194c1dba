"""The loss without logits in memory beside the plain way on a CPU: time in turn, peak memory in own processes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from megatron_rb.bench.timing import median_ratio, time_in_turn
from megatron_rb.kernels.linear_cross_entropy import reference
from megatron_rb.kernels.linear_cross_entropy.op import LOGITS_BYTES, linear_cross_entropy


@dataclass(frozen=True)
class LossSize:
    """Sizes of one comparison."""

    rows: int
    hidden_size: int
    vocabulary: int
    logits_bytes: int


SIZES = (LossSize(256, 128, 151936, LOGITS_BYTES), LossSize(256, 128, 151936, 32 * 2**20))
"""The vocabulary of Qwen; the hidden size is small so that a run takes seconds."""


def compare_losses(size: LossSize, rounds: int) -> dict[str, float]:
    """Sizes, CPU time of the plain way / ours (`speedup`), and bytes at the peak (`our_peak`, `plain_peak`)."""
    torch.manual_seed(0)
    arguments = _drawn(size)
    times = time_in_turn({name: partial(_run, name, arguments, size) for name in ("ours", "plain")}, rounds)
    peaks = {name: _peak_in_a_process(name, size) for name in ("ours", "plain")}
    return vars(size) | {
        "speedup": median_ratio(times["plain"].cpu, times["ours"].cpu),
        "our_peak": peaks["ours"],
        "plain_peak": peaks["plain"],
    }


def _drawn(size: LossSize) -> tuple[torch.Tensor, ...]:
    hidden = torch.randn(size.rows, size.hidden_size).requires_grad_()
    weight = torch.randn(size.vocabulary, size.hidden_size).requires_grad_()
    return hidden, weight, torch.arange(size.rows), torch.ones(size.rows)


def _run(name: str, arguments: tuple[torch.Tensor, ...], size: LossSize) -> None:
    hidden, weight, labels, weights = arguments
    if name == "ours":
        loss = linear_cross_entropy(hidden, weight, labels, weights, logits_bytes=size.logits_bytes)
    else:
        loss = reference.linear_cross_entropy(hidden, weight, labels, weights)
    torch.autograd.grad(loss, (hidden, weight))


def _peak_in_a_process(name: str, size: LossSize) -> int:
    """Bytes that a process needs for both passes beyond what it needs for their arguments."""
    numbers = (size.rows, size.hidden_size, size.vocabulary, size.logits_bytes)
    command = [sys.executable, "-m", "megatron_rb.bench.kernels.losses", name, *map(str, numbers)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=300).stdout)


def _print_peak(name: str, size: LossSize) -> None:
    torch.set_num_threads(1)
    small = LossSize(2, 4, 8, size.logits_bytes)
    _run(name, _drawn(small), small)  # what is loaded on first use does not count
    arguments = _drawn(size)
    before = _highest()
    _run(name, arguments, size)
    print(_highest() - before)


def _highest() -> int:
    """The most bytes this process has had in memory, as Linux counts them.

    Not `getrusage`: there a child begins with what its parent had.
    """
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    _print_peak(sys.argv[1], LossSize(*map(int, sys.argv[2:])))
