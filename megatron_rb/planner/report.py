"""What a plan looks like: a table, a json, a settings file for `rb launch`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_rb.planner.memory import SliceRecompute, StageMemory
from megatron_rb.planner.predict import Prediction
from megatron_rb.planner.task import PlanTask


def mode_line(task: PlanTask) -> str:
    """Says what the figures are, and that nothing was measured."""
    pricing = task.pricing
    source = f"figures of the device file of {pricing.device.name}"
    if pricing.calibration is not None:
        source = f"block times measured on {pricing.calibration.device}, links and memory from the device file"
    return f"{pricing.mode} prediction, not a measurement ({source})"


def table(task: PlanTask, predictions: Sequence[Prediction], rows: int = 10) -> str:
    """The ranked choices as text, with why the others lose."""
    best = predictions[0]
    head = (
        f"{'':>3} {'tp':>3} {'sp':>3} {'pp':>3} {'vpp':>4} {'cp':>3} {'dp':>5} {'packs':>6} {'batches':>8} "
        f"{'step s':>9} {'tokens/s/GPU':>13} {'MFU':>6} {'bubble':>7} {'GB':>6}  against the best"
    )
    lines = [mode_line(task), head]
    for number, item in enumerate(predictions[:rows], start=1):
        degrees = item.degrees
        fullest = max(stage.total for stage in item.memory) / 1e9
        lines.append(
            f"{number:>3} {degrees.tp:>3} {'yes' if degrees.sequence_parallel else 'no':>3} {degrees.pp:>3} "
            f"{degrees.vpp:>4} {degrees.cp:>3} {degrees.dp:>5} {degrees.micro_batch:>6} {item.num_micro_batches:>8} "
            f"{item.step_seconds:>9.3f} {item.tokens_per_second_per_gpu:>13,.0f} {item.mfu:>6.1%} "
            f"{item.bubble_ratio:>7.1%} {fullest:>6.1f}  {why(best, item)}"
        )
    return "\n".join([*lines, "", *details(best)])


def details(best: Prediction) -> list[str]:
    """Layout, recompute and memory of the best choice."""
    lines = [f"layout    {best.layout}", f"recompute {recompute_text(best.recompute)}"]
    lines += ["step      " + ", ".join(f"{name} {seconds:.3f} s" for name, seconds in best.parts.items())]
    lines += ["memory    when a micro-batch is as large as the samples planned for can make it"]
    return [*lines, *memory_lines(best.memory)]


def memory_lines(stages: Sequence[StageMemory]) -> list[str]:
    """Memory of every pipeline rank in GB."""
    names = list(stages[0].as_json())
    lines = [f"{'GB':<9} " + " ".join(f"{name:>12}" for name in names)]
    for rank, stage in enumerate(stages):
        values = " ".join(f"{value / 1e9:>12.2f}" for value in stage.as_json().values())
        lines.append(f"{'pp ' + str(rank):<9} {values}")
    return lines


def recompute_text(recompute: Sequence[SliceRecompute]) -> str:
    """Recomputed layers by slice, in words."""
    if not any(item.vision or item.language for item in recompute):
        return "nothing"
    return " | ".join(f"v*{item.vision} t*{item.language}" for item in recompute)


def why(best: Prediction, item: Prediction) -> str:
    """What costs a choice most against the best."""
    if item is best:
        return ""
    ours, theirs = _shares(item), _shares(best)
    more = {name: ours[name] - theirs[name] for name in ours}
    name = max(more, key=lambda key: more[key])
    return f"{item.step_seconds / best.step_seconds - 1:+.1%}, most of it {name} ({more[name]:+.3f} s)"


def _shares(item: Prediction) -> dict[str, float]:
    pipeline = item.parts["pipeline"]
    bubble = pipeline * item.bubble_ratio
    return {
        "work and messages between ranks": pipeline - bubble,
        "bubbles": bubble,
        "data-parallel messages": item.parts["gradients"] + item.parts["weights"],
        "optimizer": item.parts["optimizer"],
    }


def as_json(task: PlanTask, predictions: Sequence[Prediction]) -> dict[str, Any]:
    """The whole plan; `best` is the first of `ranked`."""
    ranked = [prediction_json(item) for item in predictions]
    return {
        "mode": task.pricing.mode,
        "note": mode_line(task),
        "asked": {
            "gpus": task.gpus,
            "device": task.pricing.device.name,
            "dtype": task.pricing.dtype,
            "device_memory": task.pricing.device.memory,
            "seq_length": task.seq_length,
            "max_patches": task.max_patches,
            "global_batch_size": task.global_batch_size,
            "histogram": task.sampler.histogram.source,
            **task.asked,
        },
        "best": ranked[0],
        "ranked": ranked,
    }


def prediction_json(item: Prediction) -> dict[str, Any]:
    """One choice."""
    degrees = item.degrees
    return {
        "mode": item.mode,
        "layout": str(item.layout),
        "tp": degrees.tp,
        "pp": degrees.pp,
        "vpp": degrees.vpp,
        "cp": degrees.cp,
        "dp": degrees.dp,
        "micro_batch": degrees.micro_batch,
        "num_micro_batches": item.num_micro_batches,
        "sequence_parallel": degrees.sequence_parallel,
        "recompute": {
            "vision": [part.vision for part in item.recompute],
            "language": [part.language for part in item.recompute],
        },
        "step_seconds": item.step_seconds,
        "tokens_per_second_per_gpu": item.tokens_per_second_per_gpu,
        "mfu": item.mfu,
        "bubble_ratio": item.bubble_ratio,
        "step_parts_seconds": item.parts,
        "memory_per_stage": [stage.as_json() for stage in item.memory],
    }


def settings(task: PlanTask, item: Prediction) -> dict[str, Any]:
    """The choice as settings of a run, by section."""
    degrees = item.degrees
    micro_batches = task.global_micro_batches
    step = (
        {"global_micro_batches": micro_batches // degrees.micro_batch}
        if micro_batches
        else {"global_batch_size": task.global_batch_size}
    )
    vision, language = ([getattr(part, name) for part in item.recompute] for name in ("vision", "language"))
    # All four are written, so that nothing of a recipe's own recompute stays.
    recompute = {
        "vision": 0,
        "language": 0,
        "vision_per_slice": vision if any(vision) else [],
        "language_per_slice": language if any(language) else [],
    }
    return {
        "world_size": task.gpus,
        "model": {"recompute": recompute},
        "parallel": {
            "tp_size": degrees.tp,
            "pp_size": degrees.pp,
            "cp_size": degrees.cp,
            "layout": str(item.layout),
            "sequence_parallel": degrees.sequence_parallel,
        },
        "data": {
            "seq_length": task.seq_length * degrees.micro_batch,
            "max_patches": task.max_patches * degrees.micro_batch,
            **step,
        },
    }


def settings_text(task: PlanTask, item: Prediction) -> str:
    """A file for `rb launch ... settings=FILE`."""
    lines = [
        f"# {mode_line(task)}",
        f"# {item.step_seconds:.3f} s a step, {item.tokens_per_second_per_gpu:,.0f} tokens/s/GPU, MFU {item.mfu:.1%}",
        "# use: rb launch experiment=... settings=THIS_FILE",
    ]
    return "\n".join(lines) + "\n" + yaml.safe_dump(settings(task, item), sort_keys=False, width=1000)


def write_json(task: PlanTask, predictions: Sequence[Prediction], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(as_json(task, predictions), indent=1))
