"""Time the kernels beside torch on a GPU, as shares of its measured ceilings; count machine code with --aot."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_rb.evaluation import kernel_benchmark as benchmark
from megatron_rb.platform import get_platform
from megatron_rb.platform.base import module_exists

FULL, RAGGED = [64] * 8, [64, 64, 32, 64, 64, 32, 32, 32, 16]


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    results: Any = _count_machine_code() if options.aot else _measure(options.rounds)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2))
    return 0


def _measure(rounds: int) -> Any:
    platform = get_platform()
    if platform.name != "cuda":
        print(
            f"no GPU ({platform.name}): speed on a GPU is not measured here; the CPU path beside one call per window:"
        )
        ratios = {"full": benchmark.windows_on_cpu(rounds, FULL), "ragged": benchmark.windows_on_cpu(rounds, RAGGED)}
        for name, ratio in ratios.items():
            print(f"window attention, {name:<7} forward + backward, CPU time: {ratio:.2f}x")
        return {"platform": platform.info(), "cpu_window_speedup": ratios}
    ceilings, rows = benchmark.measure_on_gpu(platform.current_device())
    copy, matmul = ceilings.values()
    print(f"{platform.info()['device']}: copy {copy / 1e12:.2f} TB/s, matmul {matmul / 1e12:.0f} TFLOP/s")
    for row in rows:
        others = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in row.speedups.items())
        share = f"{row.copy_share:6.1%} of copy (goal {row.goal:.0%})"
        print(f"{row.name:<26}{row.seconds['ours'] * 1e6:9.1f} us {share}  {others}")
        for name, reason in row.failed.items():
            print(f"{'':<26}without {name}: {reason}")
    return {"platform": platform.info(), **ceilings, "rows": [row.as_json() for row in rows]}


def _count_machine_code() -> list[dict[str, Any]]:
    if not module_exists("triton"):
        raise ValueError("--aot needs triton, which is not installed; pip install triton")
    from megatron_rb.kernels import aot

    rows = []
    print(f"{'kernel':<26}{'sm':>4}{'registers':>11}{'spills':>8}{'shared':>8}{'tensor':>8}{'wide loads':>12}")
    for kernel in aot.kernels():
        for arch in aot.ARCHITECTURES:
            row = aot.compile_kernel(kernel, arch)
            rows.append(asdict(row))
            print(
                f"{row.kernel:<26}{arch:>4}{row.registers:>11}{row.spills:>8}{row.shared_bytes:>8}"
                f"{row.tensor_core_instructions:>8}{row.wide_loads_share:>12.0%}", flush=True,
            )  # fmt: skip
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rb bench kernels", description=__doc__)
    parser.add_argument("--aot", action="store_true", help="compile for sm_80, sm_90 and sm_100 and count instructions")
    parser.add_argument("--rounds", type=int, default=15, metavar="K", help="timed rounds on CPU")
    parser.add_argument("--json", default="", metavar="FILE", help="write every number")
    return parser
