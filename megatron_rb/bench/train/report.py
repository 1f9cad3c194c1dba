"""A result as one page: a table, what it depends on, and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_rb.bench.train.picture import draw
from megatron_rb.bench.train.result import PICTURE_FILE, REPORT_FILE, RESULT_FILE, SECTIONS, Result


def write_report(result: Result, folder: Path) -> Path:
    """Write `report.md` and `report.png`; each appears whole or not at all."""
    partial = folder / f"{PICTURE_FILE}.partial"
    draw(result).savefig(partial, format="png")
    partial.replace(folder / PICTURE_FILE)
    path = folder / REPORT_FILE
    partial = folder / f"{REPORT_FILE}.partial"
    partial.write_text(_page(result), encoding="utf-8")
    partial.replace(path)
    return path


def figures(result: Result) -> list[tuple[str, str]]:
    """Name and value of what is looked at first."""
    found = result.summary()
    rows = [
        ("step", f"{found['step_seconds']:.3f} s"),
        ("tokens / s per device", f"{found['tokens_per_second']:,.0f}"),
        ("patches / s per device", f"{found['patches_per_second']:,.0f}"),
        ("samples / s", f"{found['samples_per_second']:,.2f}"),
        ("TFLOP/s per device", f"{found['tflops']:,.4g}"),
        ("MFU", f"{found['mfu']:.1%} of {result.peak.flops / 1e12:,.4g} TFLOP/s ({result.peak.source})"),
        ("waiting for data", f"{found['data_wait_share']:.2%} of the step"),
        ("bubble", f"{found['bubble']:.1%} of the passes, mean over {len(result.ranks)} ranks"),
        ("peak memory", f"{found['peak_memory_bytes'] / 1e9:.2f} GB on the fullest rank"),
        ("fill", f"{result.balance.fill:.1%} of the tokens that fit"),
        ("patches, largest / mean", f"{result.balance.micro_batch_patches:.3f} over micro-batches"),
        ("noise", f"{found['noise']:.1%} (95 % interval of the median of {len(result.steps)} steps)"),
    ]
    if result.baseline is not None:
        base = result.baseline
        side = f"{base.side}: {base.seconds:.3f} s, here {base.our_seconds:.3f} s on the same batch"
        rows.append(("beside transformers", f"{base.speedup:.2f} x as fast ({side})"))
    return rows


def _page(result: Result) -> str:
    device, mix = result.device, result.mix
    where = f"{result.devices} x {device.get('device', '')} ({device['platform']})"
    parts = [
        f"# {result.model['name']}, mix {mix['name']}, {where}",
        f"Measured on {result.date}: {result.warmup} steps to warm up, medians over {len(result.steps)} steps.",
    ]
    if device["platform"] == "cpu":
        parts.append("**CPU figures. They say nothing about a GPU.**")
    parts.append(_table(("", ""), figures(result)))
    parts.append(f"![steps, sections, passes, micro-batches]({PICTURE_FILE})")
    parts.append(
        "TFLOP/s and MFU count real tokens, real patches and labels, ViT and merger included; padding and what is "
        "computed again count nothing. Sections, bubble and timeline come from traced steps, which wait for the device "
        "at every border and are slower than timed ones."
    )
    parts += ["## Ranks", _table(*_ranks(result))]
    parts += ["## Settings", _table(("", ""), [(name, _text(value)) for name, value in result.settings.items()])]
    parts.append(", ".join(f"{name} {version}" for name, version in result.versions.items()) + ".")
    parts += ["## Mix", f"{mix.get('about', 'samples of files')}. As a file for `--mix`: `{RESULT_FILE}`, or"]
    parts.append(f"```json\n{json.dumps(mix, indent=1)}\n```")
    if "about" in mix:
        parts.append(
            "Pixels are copied from a pool of noise: waiting for data holds packing and copying, not the decoding of "
            "pictures. `data.train=[...]` measures real files."
        )
    return "\n\n".join(parts) + "\n"


def _ranks(result: Result) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    head = ("rank", "stage", "blocks", *(f"{name} [ms]" for name in SECTIONS), "bubble", "peak [GB]")
    rows = []
    for rank in result.ranks:
        milliseconds = (f"{1000 * rank.sections[name]:,.1f}" for name in SECTIONS)
        peak = "" if rank.peak_memory_bytes is None else f"{rank.peak_memory_bytes / 1e9:.2f}"
        blocks = rank.blocks.replace("*", "\\*")
        rows.append((str(rank.rank), str(rank.pp_rank), blocks, *milliseconds, f"{rank.bubble:.1%}", peak))
    return head, rows


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _text(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"`{text}`".replace("|", "\\|")
