"""The loss without logits in memory beside the plain way on a CPU: time in turn, peak memory in own processes."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from megatron_rb.bench.timing import median_ratio, time_in_turn
from megatron_rb.config.failures import ProcessFailed
from megatron_rb.kernels.linear_cross_entropy import reference
from megatron_rb.kernels.linear_cross_entropy.op import LOGITS_BYTES, linear_cross_entropy
from megatron_rb.launch.job import WORKER

PEAK = "megatron_rb.bench.kernels.losses:measure_peak"
SPEC_FILE, PEAK_FILE = "spec.json", "peak.json"


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
    with tempfile.TemporaryDirectory(prefix="peak-") as folder:
        (Path(folder) / SPEC_FILE).write_text(json.dumps({"name": name, "size": asdict(size)}))
        code = subprocess.run([sys.executable, "-m", WORKER, PEAK, folder], timeout=300).returncode
        if code:
            raise ProcessFailed(f"the process that measures the memory of {name}", code)
        return json.loads((Path(folder) / PEAK_FILE).read_text())


def measure_peak(folder: Path) -> None:
    """What such a process does; memory is counted from after its imports."""
    torch.set_num_threads(1)
    spec = json.loads((folder / SPEC_FILE).read_text())
    name, size = spec["name"], LossSize(**spec["size"])
    small = LossSize(2, 4, 8, size.logits_bytes)
    _run(name, _drawn(small), small)  # what is loaded on first use does not count
    arguments = _drawn(size)
    before = _highest()
    _run(name, arguments, size)
    (folder / PEAK_FILE).write_text(json.dumps(_highest() - before))


def _highest() -> int:
    """The most bytes this process has had in memory, as Linux counts them.

    Not `getrusage`: there a child begins with what its parent had.
    """
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
