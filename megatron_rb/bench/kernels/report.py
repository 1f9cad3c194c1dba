"""A run of `rb bench kernels` as files for people: a table in Markdown, and a picture."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rb.bench.kernels.measure import MeasuredCase


def file_stem(device: str, date: str) -> str:
    """`<card>-<date>`, safe as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + f"-{date}"


def gpu_markdown(
    title: str, platform: Mapping[str, Any], ceilings: Mapping[str, float], rows: Sequence[MeasuredCase]
) -> str:
    """The table of a GPU run."""
    copy, matmul = ceilings["copy_bytes_per_second"], ceilings["matmul_flops_per_second"]
    lines = [
        f"# {title}",
        "",
        _versions(platform),
        "",
        f"Ceilings measured in the same run: copy {copy / 1e12:.2f} TB/s, bf16 matrix product {matmul / 1e12:.0f} "
        f"TFLOP/s. Shares are of these. Medians; buffers do not fit into the cache.",
        "",
        "| operator | time [us] | of copy | of matmul | goal | reached | peak memory [MB] | beside |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        goal = "" if row.goal is None else f"{row.goal:.0%}"
        goal += "".join(f", {times:g}x {name}" for name, times in row.at_least.items())
        reached = {True: "yes", False: "no", None: ""}[row.reached]
        beside = "; ".join(f"{times:.2f}x {name}" for name, times in row.speedups.items())
        beside += "".join(f"; without {name}: {why}" for name, why in row.failed.items())
        lines.append(
            f"| {row.name} | {row.seconds['ours'] * 1e6:.1f} | {row.copy_share:.1%} | {row.matmul_share:.1%} | {goal} "
            f"| {reached} | {_peaks(row)} | {beside} |"
        )
    return "\n".join(lines) + "\n"


def _peaks(row: MeasuredCase) -> str:
    ours = f"{row.peak_bytes['ours'] / 1e6:.0f}"
    others = "; ".join(f"{peak / 1e6:.0f} {name}" for name, peak in row.peak_bytes.items() if name != "ours")
    return f"{ours} ({others})" if others else ours


def cpu_markdown(title: str, platform: Mapping[str, Any], towers: Sequence[Mapping], losses: Sequence[Mapping]) -> str:
    """The tables of a run on a CPU."""
    lines = [
        f"# {title}",
        "",
        _versions(platform),
        "",
        "Speed on a GPU is not in this file. fp32, one thread, CPU time, medians over rounds in which both sides take "
        "turns; above 1 this stack is faster.",
        "",
        "Vision tower beside transformers' own, forward and backward:",
        "",
        "| family | hidden size | images | patches | transformers [s] | ours [s] | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {t['family']} | {t['hidden_size']} | {t['images']} | {t['patches']} | {t['transformers']:.3f} | "
        f"{t['ours']:.3f} | {t['speedup']:.2f}x |"
        for t in towers
    ]
    lines += [
        "",
        "Projection to the vocabulary and cross entropy, forward and backward, beside the plain way with all "
        "logits in memory (peak memory above what was there before):",
        "",
        "| rows | hidden size | vocabulary | logits at a time [MiB] | plain [MB] | ours [MB] | ratio of time |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {x['rows']} | {x['hidden_size']} | {x['vocabulary']} | {x['logits_bytes'] / 2**20:.0f} | "
        f"{x['plain_peak'] / 1e6:.0f} | {x['our_peak'] / 1e6:.0f} | {x['speedup']:.2f}x |"
        for x in losses
    ]
    return "\n".join(lines) + "\n"


def _versions(platform: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in platform.items())


def draw_gpu(ceilings: Mapping[str, float], rows: Sequence[MeasuredCase], title: str, path: Path) -> None:
    """Roofline of the operators that compute, and every operator's share of the copy bandwidth beside its goal."""
    from matplotlib.figure import Figure  # a second of imports that only a plot needs

    figure = Figure(figsize=(14, 6), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    copy, matmul = ceilings["copy_bytes_per_second"], ceilings["matmul_flops_per_second"]
    ridge = matmul / copy
    left.loglog([0.1, ridge, 50 * ridge], [0.1 * copy / 1e12, matmul / 1e12, matmul / 1e12], color="black")
    for row in (row for row in rows if row.flops):
        x, y = row.flops / row.bytes, row.flops / row.seconds["ours"] / 1e12
        left.plot(x, y, "o")
        left.annotate(row.name, (x, y), xytext=(5, -10), textcoords="offset points", fontsize=8)
    left.set(title="Roofline", xlabel="FLOP per byte", ylabel="TFLOP/s")
    left.grid(alpha=0.3, which="both")
    bars = [row for row in rows if row.matmul_share < row.copy_share]
    places = range(len(bars))
    right.barh(places, [100 * row.copy_share for row in bars], color="tab:blue")
    for place, row in enumerate(bars):
        if row.goal is not None:
            right.plot([100 * row.goal] * 2, [place - 0.4, place + 0.4], color="tab:red")
    right.set(title="Share of copy bandwidth [%] (red: goal)", yticks=places, yticklabels=[row.name for row in bars])
    right.invert_yaxis()
    figure.suptitle(title)
    figure.savefig(path)


def draw_cpu(towers: Sequence[Mapping], title: str, path: Path) -> None:
    """Bars of the speed beside transformers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=110, layout="constrained")
    axis = figure.subplots()
    labels = [f"{t['family']}, width {t['hidden_size']}, {t['images']}" for t in towers]
    axis.barh(range(len(towers)), [t["speedup"] for t in towers], color="tab:blue")
    axis.axvline(1.0, color="black")
    axis.set(yticks=range(len(towers)), yticklabels=labels, xlabel="CPU time of transformers / ours", title=title)
    axis.invert_yaxis()
    figure.savefig(path)
