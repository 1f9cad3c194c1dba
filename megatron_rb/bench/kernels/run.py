"""What `rb bench kernels` runs, prints and writes, on a GPU and on a CPU."""

from __future__ import annotations

import json
import platform as machine
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from megatron_rb.app.session import adapt_megatron
from megatron_rb.bench.kernels import report as kernel_benchmark_report
from megatron_rb.bench.kernels.measure import measure_on_gpu
from megatron_rb.kernels.dispatch import Call, kernel_table
from megatron_rb.platform import Platform
from megatron_rb.shapes.families import FAMILIES

PACKAGES = ("torch", "triton", "transformers", "flash-attn", "liger-kernel")


@dataclass(frozen=True)
class Report:
    """A finished run."""

    stem: str
    """`<card>-<date>`"""
    results: dict[str, Any]
    markdown: str
    draw: Callable[[Path], None]

    def write(self, folder: Path) -> list[Path]:
        """`<stem>.json`, `.md` and `.png` in a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{self.stem}{suffix}" for suffix in (".json", ".md", ".png")]
        paths[0].write_text(json.dumps(self.results, indent=2) + "\n")
        paths[1].write_text(self.markdown)
        self.draw(paths[2])
        return paths


def measure_gpu(platform: Platform, date: str) -> Report:
    """Every case on the present GPU, printed as it is done."""
    info = platform.info() | _versions()
    for operator, name, state in kernel_table(platform, Call(torch.bfloat16, 80, 64)):
        print(f"{operator:<22}{name:<14}{state}")
    ceilings, rows = measure_on_gpu(platform.current_device())
    title = f"Kernels on {info['device']}, {date}"
    markdown = kernel_benchmark_report.gpu_markdown(title, info, ceilings, rows)
    print(markdown)
    results = {"date": date, "platform": info, **ceilings, "rows": [row.as_json() for row in rows]}
    return Report(
        kernel_benchmark_report.file_stem(str(info["device"]), date),
        results,
        markdown,
        lambda path: kernel_benchmark_report.draw_gpu(ceilings, rows, title, path),
    )


def measure_cpu(platform: Platform, date: str, rounds: int) -> Report:
    """The vision tower and the loss on this machine's CPU, one thread, printed as they are done."""
    adapt_megatron(platform.name)
    info = {"cpu": _cpu_name()} | _versions()
    title = f"Kernels on a CPU ({info['cpu']}), {date}"
    towers, losses = _towers(rounds), _losses(rounds)
    results = {"date": date, "platform": info, "rounds": rounds, "towers": towers, "losses": losses}
    markdown = kernel_benchmark_report.cpu_markdown(title, info, towers, losses)
    return Report(
        kernel_benchmark_report.file_stem(info["cpu"], date),
        results,
        markdown,
        lambda path: kernel_benchmark_report.draw_cpu(towers, title, path),
    )


def _towers(rounds: int) -> list[dict[str, Any]]:
    from megatron_rb.bench.kernels.towers import compare_towers  # imports megatron-core

    rows = []
    for family in FAMILIES:
        for narrow in (True, False):
            with tempfile.TemporaryDirectory(prefix="bench-") as folder:
                for result in compare_towers(folder, family, narrow=narrow, rounds=rounds):
                    seconds = {side: times.median_cpu for side, times in result.times.items()}
                    rows.append(asdict(result) | seconds | {"speedup": result.speedup})
                    print(
                        f"vision tower {family:<11} width {result.hidden_size:<5} {result.images:<15}"
                        f"{result.speedup:6.2f}x transformers",
                        flush=True,
                    )
    return rows


def _losses(rounds: int) -> list[dict[str, Any]]:
    from megatron_rb.bench.kernels.losses import SIZES, compare_losses

    rows = []
    for size in SIZES:
        row = compare_losses(size, rounds)
        rows.append(row)
        peaks = f"peak {row['our_peak'] / 1e6:.0f} MB instead of {row['plain_peak'] / 1e6:.0f} MB"
        limit = f"{size.logits_bytes / 2**20:.0f} MiB of logits at a time"
        print(f"linear + cross entropy, {limit}: {row['speedup']:.2f}x the plain way, {peaks}", flush=True)
    return rows


def count_machine_code() -> list[dict[str, Any]]:
    """Compile every kernel for every architecture, print a line for each, and return the counts."""
    from megatron_rb.kernels.aot import assemblers as aot

    rows = []
    print(f"{'kernel':<26}{'sm':>4}{'registers':>11}{'spills':>8}{'shared':>8}{'tensor':>8}{'wide loads':>12}")
    for kernel in aot.kernels():
        for arch in aot.ARCHITECTURES:
            row = aot.compile_kernel(kernel, arch)
            rows.append(asdict(row))
            print(
                f"{row.kernel:<26}{arch:>4}{row.registers:>11}{row.spills:>8}{row.shared_bytes:>8}"
                f"{row.tensor_core_instructions:>8}{row.wide_loads_share:>12.0%}",
                flush=True,
            )
    return rows


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else machine.processor() or machine.machine()
