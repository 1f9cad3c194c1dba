"""Which implementation a run takes for every part that has several, and why: for people and for a script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from megatron_rb.config.schema import Config
from megatron_rb.kernels.dispatch import TABLE, Call, select, why_not
from megatron_rb.models.layer_names import layers_taken
from megatron_rb.platform import Platform
from megatron_rb.platform.dtypes import DTYPES
from megatron_rb.shapes.shape import RoboBrainShape

LANGUAGE_HEAD_DIM = 128
"""Of the published models."""
WINDOWS = (80, 64)
"""`(head_dim, longest sequence)` of window attention in the published models."""
SETTING = {"qk_norm_mrope": "mrope"}
"""The setting in `kernels` that an operator follows, where it bears another name."""
TAKEN = "taken"


@dataclass(frozen=True)
class Row:
    part: str
    implementation: str
    why: str
    """`taken`, or the reason why not."""

    @property
    def taken(self) -> bool:
        return self.why.startswith(TAKEN)


def kernel_report(
    platform: Platform,
    dtype: torch.dtype,
    layers: str = "auto",
    requests: Mapping[str, str] | None = None,
    head_dim: int = LANGUAGE_HEAD_DIM,
    windows: tuple[int, int] = WINDOWS,
) -> list[Row]:
    """One row per part and implementation, for calls in `dtype`; unless other sizes are given, of the published models.

    Args:
        layers: `model.layers`.
        requests: by operator `auto` or the implementation that is asked for, as in `kernels.<operator>=...`.

    Raises:
        ValueError: what is asked for cannot run here.
    """
    rows = [*_layer_rows(platform, dtype, layers), *_optimizer_rows(platform)]
    for operator in TABLE:
        asked = (requests or {}).get(SETTING.get(operator, operator), "auto")
        sizes = windows if operator == "window_attention" else (head_dim, 0)
        rows += _operator_rows(platform, operator, Call(dtype, *sizes), asked)
    return rows


def report_of_run(config: Config, platform: Platform, shape: RoboBrainShape) -> list[Row]:
    """The rows of a run: its settings and the sizes of its model.

    Raises:
        ValueError: what the settings ask for cannot run here.
    """
    return kernel_report(
        platform,
        DTYPES[config.model.dtype],
        config.model.layers,
        vars(config.kernels),
        shape.text.head_dim,
        (shape.vision.head_dim, 0),
    )


def refused_settings(config: Config, platform: Platform, shape: RoboBrainShape) -> dict[str, str]:
    """The settings of layers and kernels that ask for what cannot run here, each with its reason in a sentence."""
    dtype, refused = DTYPES[config.model.dtype], {}
    checks = {"model.layers": partial(_layer_rows, platform, dtype, config.model.layers)}
    for name, asked in vars(config.kernels).items():
        size = shape.vision.head_dim if name == "window_attention" else shape.text.head_dim
        checks[f"kernels.{name}"] = partial(_operator_rows, platform, name, Call(dtype, size), asked)
    for setting, check in checks.items():
        try:
            check()
        except ValueError as error:
            refused[setting] = str(error)
    return refused


def taken_line(rows: Sequence[Row]) -> str:
    """What is taken for every part, in one line of a log."""
    taken = ", ".join(f"{row.part} {row.implementation}" for row in rows if row.taken)
    return f"kernels: {taken} (rb doctor --kernels says why)"


def report_text(platform: Platform, dtype: torch.dtype, rows: Sequence[Row]) -> str:
    """A table with a line that says where it holds."""
    widths = [max(len(getattr(row, name)) for row in rows) for name in ("part", "implementation")]
    device = platform.info()["device"]
    head = f"{platform.name} ({platform.vendor}), {device}, {str(dtype).removeprefix('torch.')}, collectives over "
    lines = [head + platform.collective_backend]
    for row in rows:
        mark = "->" if row.taken else "  "
        lines.append(f"{mark} {row.part:{widths[0]}}  {row.implementation:{widths[1]}}  {row.why}")
    return "\n".join(lines)


def _layer_rows(platform: Platform, dtype: torch.dtype, asked: str) -> list[Row]:
    installed = platform.offers("te")
    name = "fp32" if dtype is torch.float32 else "bf16"
    taken = layers_taken(asked, name, installed)
    if asked == "local":
        reason = "model.layers=local asks for the other"
    elif not installed:
        reason = f"Transformer Engine for {platform.name} is not installed"
    else:
        reason = "it has no attention over packed sequences in fp32"
    others = {"transformer_engine": reason, "local": "transformer_engine comes first"}
    return [Row("layers", name, TAKEN if name == taken else why) for name, why in others.items()]


def _optimizer_rows(platform: Platform) -> list[Row]:
    fused = platform.offers("fused_adam")
    why = TAKEN if fused else f"no fused Adam of Transformer Engine or Apex for {platform.name} is installed"
    return [Row("adam", "vendor", why), Row("adam", "torch", "vendor comes first" if fused else TAKEN)]


def _operator_rows(platform: Platform, operator: str, call: Call, asked: str) -> list[Row]:
    taken = select(operator, platform, call, asked).name
    rows = []
    for row in TABLE[operator]:
        reason = why_not(row, platform, call, requested=row.name == asked)
        if row.name == taken:
            setting = SETTING.get(operator, operator)
            reason = TAKEN if asked == "auto" else f"{TAKEN}: kernels.{setting}={asked} asks for it"
        rows.append(Row(operator, row.name, reason or f"{taken} comes first"))
    return rows
