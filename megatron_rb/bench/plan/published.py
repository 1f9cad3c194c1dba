"""What the planner says about layouts that were published, and how its predictions scale: figures, no measurements."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rb.app.planning import pack
from megatron_rb.layout import parse_layout
from megatron_rb.planner.cost import Pricing
from megatron_rb.planner.device import load_device
from megatron_rb.planner.histogram import Histogram, histogram_of
from megatron_rb.planner.memory import SliceRecompute
from megatron_rb.planner.predict import Prediction, best_for, evaluate
from megatron_rb.planner.report import mode_line, prediction_json, recompute_text
from megatron_rb.planner.search import plan
from megatron_rb.planner.task import Degrees, Infeasible, PlanTask
from megatron_rb.planner.workload import MicroBatchSampler
from megatron_rb.shapes.published import CONFIGS
from megatron_rb.shapes.shape import shape_from_dict

PACKS_A_STEP = 256
"""The published runs take steps of 256 samples, one a micro-batch; packed, that is 256 full micro-batches."""
GPUS = tuple(8 * 4**power for power in range(6))
FIXED_PACKS = 1024
"""Micro-batches a step where the batch does not grow."""
PACKS_A_GPU = 2
"""Micro-batches a step and GPU where the batch grows with the cluster."""


@dataclass(frozen=True)
class HandMade:
    """A layout that was published with its run."""

    name: str
    model: str
    gpus: int
    tp: int
    layout: str
    seq_length: int
    recompute_vision: int = 0

    @property
    def pp(self) -> int:
        return self.layout.count("|") + 1


# FlagScale's released (later deleted) training configs of RoboBrain 2.0.
PUBLISHED = (
    HandMade("7B, first stage 10 of 28", "RoboBrain2.0-7B", 128, 2, "P v*32 M E t*10 | t*18 L", 16384),
    HandMade(
        "7B on four stages, first stage 4 of 28 (published for a frozen ViT, here it trains)",
        "RoboBrain2.0-7B",
        128,
        1,
        "P v*32 M E t*4 | t*8 | t*8 | t*8 L",
        16384,
    ),
    HandMade("32B, first stage 13 of 64", "RoboBrain2.0-32B", 512, 4, "P v*32 M E t*13 | t*17 | t*17 | t*17 L", 16384),
    HandMade(
        "32B at 32K, first stage 10 of 64",
        "RoboBrain2.0-32B",
        512,
        8,
        "P v*32 M E t*10 | t*18 | t*18 | t*18 L",
        32768,
        16,
    ),
)


def image_mix(samples: int = 20000, seed: int = 0) -> Histogram:
    """Conversations with none to eight pictures of 448, 560, 672 or 896 pixels a side; texts of log-normal length."""
    draw = np.random.default_rng(seed)
    text = np.minimum(draw.lognormal(5.5, 1.0, samples).astype(int) + 20, 4000)
    frame = draw.choice([(side // 14) ** 2 for side in (448, 560, 672, 896)], samples)
    patches = frame * draw.integers(0, 9, samples)
    source = "declared mix: 0-8 pictures of 448-896 px, text log-normal with median 245 + 20 tokens"
    return histogram_of(text, patches, np.where(patches > 0, frame, 0), source)


def video_mix(samples: int = 20000, seed: int = 0) -> Histogram:
    """Videos of 16 to 64 frames of 392 x 504 pixels with texts of log-normal length."""
    draw = np.random.default_rng(seed)
    text = np.minimum(draw.lognormal(5.0, 1.0, samples).astype(int) + 20, 2000)
    frame = 28 * 36
    patches = frame * draw.integers(8, 33, samples)
    source = "declared mix: videos of 16-64 frames of 392 x 504 px, text log-normal with median 148 + 20 tokens"
    return histogram_of(text, patches, np.full(samples, float(frame)), source)


MIXES: dict[str, Callable[[], Histogram]] = {"images": image_mix, "videos": video_mix}


def task_of(model: str, gpus: int, histogram: Histogram, seq_length: int, packs: float, device: str) -> PlanTask:
    """A planning task with steps of about so many full micro-batches."""
    shape = shape_from_dict(CONFIGS[model])
    tokens = histogram.tokens(shape.vision.merge_unit) @ histogram.counts / histogram.num_samples
    batch = max(1, round(packs * seq_length / float(tokens)))
    sampler = MicroBatchSampler(histogram, shape.vision.merge_unit, batch, pack)
    return PlanTask(shape, Pricing(load_device(device), "bf16"), gpus, sampler, seq_length, 4 * seq_length)


def compare(hand: HandMade, histogram: Histogram, device: str) -> dict[str, Prediction | str]:
    """The published layout, the best cut of the same degrees without and with a spread ViT, and the free choice."""
    task = task_of(hand.model, hand.gpus, histogram, hand.seq_length, PACKS_A_STEP, device)
    shape = task.model
    degrees = Degrees(hand.tp, hand.pp, 1, hand.gpus // hand.tp // hand.pp, 1, hand.tp > 1)
    layout = parse_layout(hand.layout, shape.vision.num_layers, shape.text.num_layers, hand.pp)
    recompute = tuple(SliceRecompute(hand.recompute_vision if number == 0 else 0) for number in range(hand.pp))
    whole = shape.vision.num_layers + 2  # patch embedding, ViT, merger
    rows: dict[str, Callable[[], Prediction]] = {
        "as published": lambda: evaluate(task, degrees, layout, recompute),
        "published cut, recompute that fits": lambda: evaluate(task, degrees, layout),
        "same degrees, ViT on stage 0": lambda: best_for(task, degrees, whole),
        "same degrees, ViT spread": lambda: best_for(task, degrees),
        "planner's choice": lambda: plan(task)[0],
    }
    return {name: _or_reason(row) for name, row in rows.items()}


def _best(task: PlanTask) -> Prediction:
    return plan(task)[0]


def _or_reason(predict: Callable[[], Prediction]) -> Prediction | str:
    try:
        return predict()
    except Infeasible as reason:
        return str(reason)


def scaling(model: str, histogram: Histogram, device: str) -> dict[int, dict[str, Prediction | str]]:
    """The planner's choice from 8 to 8,192 GPUs, with a batch that grows with the GPUs and with one that does not."""
    found = {}
    for gpus in GPUS:
        grown = task_of(model, gpus, histogram, 16384, PACKS_A_GPU * gpus, device)
        fixed = task_of(model, gpus, histogram, 16384, FIXED_PACKS, device)
        found[gpus] = {
            f"{PACKS_A_GPU} packs a GPU": _or_reason(partial(_best, grown)),
            f"{FIXED_PACKS:,} packs": _or_reason(partial(_best, fixed)),
        }
    return found


def write_report(folder: Path, device: str, report: Callable[[str], None] = lambda _: None) -> None:
    """Write `published.md` and `published.json`."""
    content: dict[str, Any] = {"device": load_device(device).name, "published": {}, "scaling": {}}
    lines = _head(device)
    for mix, build in MIXES.items():
        histogram = build()
        lines += [f"## {mix}", "", f"{histogram.source}.", "", *TABLE_HEAD]
        for hand in PUBLISHED:
            rows = compare(hand, histogram, device)
            lines += _rows(hand, rows, load_device(device).memory)
            content["published"][f"{hand.name}, {mix}"] = {name: _json(item) for name, item in rows.items()}
            report(f"{hand.name}, {mix}")
        lines.append("")
    lines += ["## From 8 to 8,192 GPUs", "", "Mix `images`, 16,384 tokens a micro-batch.", ""]
    for model in ("RoboBrain2.0-7B", "RoboBrain2.0-32B"):
        found = scaling(model, image_mix(), device)
        lines += [f"### {model}", "", *_scaling_lines(found), ""]
        content["scaling"][model] = {
            gpus: {name: _json(item) for name, item in row.items()} for gpus, row in found.items()
        }
        report(f"scaling of {model}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "published.md").write_text("\n".join(lines).rstrip() + "\n")
    (folder / "published.json").write_text(json.dumps(content, indent=1) + "\n")


TABLE_HEAD = (
    "| run | layout | degrees | recompute | s / step | tokens/s/GPU | MFU | bubble | fullest rank |",
    "|---|---|---|---|---|---|---|---|---|",
)


def _head(device: str) -> list[str]:
    task = task_of("RoboBrain2.0-7B", 8, image_mix(100), 16384, 8, device)
    return [
        "# Published layouts and scaling: nominal prediction, not measured",
        "",
        f"`rb plan --published DIR --device {device}` wrote this: {mode_line(task)}.",
        "No GPU has run any of these layouts here; the figures compare choices and promise nothing.",
        "",
        f"Steps of {PACKS_A_STEP} full micro-batches (the published runs: 256 samples, one a micro-batch, unpacked).",
        "`fullest rank` above the memory of the device means that the layout does not fit with this recompute at the",
        "largest micro-batch that padding asks for. Where the ViT is less work than a stage, spreading it changes",
        "nothing, and the two rows are the same.",
        "",
    ]


def _rows(hand: HandMade, rows: dict[str, Prediction | str], memory: float) -> list[str]:
    lines = []
    for name, item in rows.items():
        title = f"{hand.name}: {name}"
        if isinstance(item, str):
            lines.append(f"| {title} | {item.replace('|', '/')} | | | | | | | |")
            continue
        fullest = max(stage.total for stage in item.memory)
        too_much = " (too much)" if fullest > memory else ""
        layout = str(item.layout).replace("|", "/")
        recompute = recompute_text(item.recompute).replace("|", "/")
        lines.append(
            f"| {title} | `{layout}` | {item.degrees} | {recompute} | {item.step_seconds:.3f} | "
            f"{item.tokens_per_second_per_gpu:,.0f} | {item.mfu:.1%} | {item.bubble_ratio:.1%} | "
            f"{fullest / 1e9:.1f} GB{too_much} |"
        )
    return lines


def _scaling_lines(found: dict[int, dict[str, Prediction | str]]) -> list[str]:
    lines = [
        "| GPUs | batch | degrees | micro-batches a rank | s / step | tokens/s/GPU | MFU | of the first |",
        "|---|---|---|---|---|---|---|---|",
    ]
    first: dict[str, float] = {}
    for gpus, row in found.items():
        for name, item in row.items():
            if isinstance(item, str):
                lines.append(f"| {gpus:,} | {name} | {item.replace('|', '/')} | | | | | |")
                continue
            base = first.setdefault(name, item.tokens_per_second_per_gpu)
            lines.append(
                f"| {gpus:,} | {name} | {item.degrees} | {item.num_micro_batches} | {item.step_seconds:.3f} | "
                f"{item.tokens_per_second_per_gpu:,.0f} | {item.mfu:.1%} | "
                f"{item.tokens_per_second_per_gpu / base:.0%} |"
            )
    return lines


def _json(item: Prediction | str) -> Any:
    return item if isinstance(item, str) else prediction_json(item)
