"""The numbers of a step: one list that says of each its name, value, unit, and where it is shown.

`metrics.jsonl`, TensorBoard and the console show what stands here; a new number is a new row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_rb.metrics.record import StepRecord

Value = float | int | None


@dataclass(frozen=True)
class Column:
    """One number of a step."""

    name: str
    """In `metrics.jsonl`."""
    value: Callable[[StepRecord], Value | Mapping[str, float]]
    """None where it is not known; a mapping is one number per module."""
    unit: str = ""
    tensorboard: str = ""
    """Tag; empty = not there."""
    console: Callable[[Any], str] | None = None
    """The value as text of the console's line, empty = leave it out; None = not there."""
    unknown: str = ""
    """The console's text for a value that is not known; empty = leave it out."""


def quantity(value: float) -> str:
    """Three digits and a thousands suffix: `941`, `12.3k`, `1.25M`."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            scaled = value / limit
            return f"{scaled:.{max(0, 2 - len(str(int(scaled))) + 1)}f}{suffix}"
    return f"{value:.0f}"


def _rates(rates: Mapping[str, float]) -> str:
    if len(set(rates.values())) <= 1:
        return next((f"lr {rate:.2e}" for rate in rates.values()), "lr -")
    return "lr " + " ".join(f"{name} {rate:.2e}" for name, rate in rates.items())


COLUMNS = (
    Column("step", lambda record: record.step),
    Column("epoch", lambda record: record.epoch),
    Column("loss", lambda record: record.loss, "per label", "train/loss", lambda loss: f"loss {loss:.4f}"),
    Column("learning_rates", lambda record: record.learning_rates, "", "learning_rate", _rates),
    Column(
        "grad_norm",
        lambda record: record.grad_norm,
        "",
        "train/grad_norm",
        lambda norm: f"grad norm {norm:.3g}",
        "grad norm -",
    ),
    Column("loss_scale", lambda record: record.loss_scale, "", "train/loss_scale"),
    Column("num_tokens", lambda record: record.num_tokens, "tokens"),
    Column("num_labels", lambda record: record.num_labels, "labels", "train/labels"),
    Column("num_patches", lambda record: record.num_patches, "patches"),
    Column("num_samples", lambda record: record.num_samples, "samples"),
    Column(
        "tokens_per_second",
        lambda record: record.tokens_per_second,
        "tokens/s",
        "speed/tokens_per_second",
        lambda rate: f"{quantity(rate)} tokens/s",
    ),
    Column(
        "patches_per_second",
        lambda record: record.patches_per_second,
        "patches/s",
        "speed/patches_per_second",
        lambda rate: f"{quantity(rate)} patches/s",
    ),
    Column("flops", lambda record: record.flops, "FLOP"),
    Column(
        "tflops",
        lambda record: record.tflops,
        "TFLOP/s per device",
        "speed/tflops_per_device",
        lambda rate: f"{rate:.3g} TFLOP/s",
    ),
    Column("mfu", lambda record: record.mfu, "0..1", "speed/mfu", lambda share: f"MFU {share:.1%}"),
    Column("data_wait_seconds", lambda record: record.data_wait_seconds, "s"),
    Column(
        "data_wait_share",
        lambda record: record.data_wait_share,
        "0..1",
        "speed/data_wait_share",
        lambda share: f"data wait {share:.0%}",
    ),
    Column(
        "memory_bytes",
        lambda record: record.memory_bytes,
        "bytes",
        "speed/memory_bytes",
        lambda size: f"memory {size / 2**30:.1f} GiB",
    ),
    Column(
        "skipped_updates",
        lambda record: record.skipped_updates,
        "updates",
        "train/skipped_updates",
        lambda count: f"{count} updates skipped" if count else "",
    ),
    Column("seconds", lambda record: record.seconds, "s", "speed/step_seconds", lambda time: f"{time:.2f} s"),
)


def values(record: StepRecord) -> dict[str, Any]:
    """All numbers of a step by name; None where one is not known."""
    return {column.name: column.value(record) for column in COLUMNS}


def tagged(record: StepRecord) -> dict[str, float]:
    """The numbers of a step that are known, by TensorBoard tag."""
    found: dict[str, float] = {}
    for column in COLUMNS:
        value = column.value(record) if column.tensorboard else None
        if isinstance(value, Mapping):
            found |= {f"{column.tensorboard}/{name}": number for name, number in value.items()}
        elif value is not None:
            found[column.tensorboard] = value
    return found


def line(record: StepRecord) -> list[str]:
    """The numbers of a step that the console shows, in order."""
    texts = []
    for column in COLUMNS:
        if column.console is not None:
            value = column.value(record)
            texts.append(column.unknown if value is None else column.console(value))
    return [text for text in texts if text]
