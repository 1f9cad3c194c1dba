"""What a benchmark of training steps found: every step, every stage, and all that the figures depend on."""

from __future__ import annotations

import json
import math
import platform as host
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_rb.metrics.balance import Balance
from megatron_rb.metrics.timeline import Span, StageTimeline
from megatron_rb.planner.device import Peak

FORMAT = 1
RESULT_FILE, REPORT_FILE, PICTURE_FILE = "result.json", "report.md", "report.png"
PACKAGES = ("megatron-rb", "torch", "megatron-core", "transformers", "numpy", "triton", "flash-attn")

SECTIONS = ("data", "vision forward", "language forward", "other forward", "backward", "waiting", "optimizer", "other")
"""Parts of a traced step of one rank. `waiting` = within the passes but not computing: for other stages, for messages,
for the reduction of gradients."""


@dataclass(frozen=True)
class StepFigures:
    """One timed step; counts are of real rows over all ranks."""

    seconds: float
    data_wait_seconds: float
    """The longest over the ranks."""
    samples: int
    tokens: int
    labels: int
    patches: int
    flops: float
    """Of the model's forward and backward pass on these rows; what is computed again is not counted."""


@dataclass(frozen=True)
class RankFigures:
    """One rank: medians over the traced steps, and its memory."""

    rank: int
    pp_rank: int
    blocks: str
    """The slice of the layout."""
    sections: dict[str, float]
    """Seconds by section."""
    bubble: float
    """Share of the passes of its pipeline in which it computed nothing."""
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class Baseline:
    """transformers' own step on the first batch of the mix, in the same run on the same device."""

    side: str
    """The way of feeding the batch that was faster."""
    seconds: float
    our_seconds: float
    """Of this stack on the same batch."""
    speedup: float
    """Median over the rounds of theirs / ours."""
    losses: dict[str, float]
    tokens: int
    patches: int


@dataclass(frozen=True)
class Result:
    """A finished benchmark."""

    date: str
    versions: dict[str, str]
    device: dict[str, Any]
    devices: int
    """Processes, each with a device of its own."""
    model: dict[str, Any]
    mix: dict[str, Any]
    settings: dict[str, Any]
    warmup: int
    steps: tuple[StepFigures, ...]
    ranks: tuple[RankFigures, ...]
    timeline: tuple[StageTimeline, ...]
    """Of the last traced step."""
    loads: list[list[list[int]]]
    """Tokens and patches of the micro-batches of every rank in the first timed step."""
    balance: Balance
    peak: Peak
    baseline: Baseline | None = None
    format: int = FORMAT

    def per_second(self, count: Callable[[StepFigures], float]) -> list[float]:
        """A rate per device for every step."""
        return [count(step) / step.seconds / self.devices for step in self.steps]

    def summary(self) -> dict[str, float]:
        """Medians over the timed steps; rates are per device, except samples."""
        flops = statistics.median(self.per_second(lambda step: step.flops))
        return {
            "step_seconds": statistics.median(step.seconds for step in self.steps),
            "tokens_per_second": statistics.median(self.token_rates()),
            "patches_per_second": statistics.median(self.per_second(lambda step: step.patches)),
            "samples_per_second": statistics.median(self.per_second(lambda step: step.samples)) * self.devices,
            "tflops": flops / 1e12,
            "mfu": flops / self.peak.flops,
            "data_wait_share": statistics.median(step.data_wait_seconds / step.seconds for step in self.steps),
            "bubble": statistics.mean(rank.bubble for rank in self.ranks),
            "peak_memory_bytes": float(max((rank.peak_memory_bytes or 0 for rank in self.ranks), default=0)),
            "noise": self.noise(),
        }

    def token_rates(self) -> list[float]:
        """Tokens per second and device of every step."""
        return self.per_second(lambda step: step.tokens)

    def noise(self) -> float:
        """Half-width of the 95 % interval of the median token rate, as a share of it.

        1.57 x interquartile range / sqrt(steps): McGill, Tukey and Larsen, Variations of Box Plots, 1978. Infinite
        for fewer than four steps, which say nothing about their spread.
        """
        rates = self.token_rates()
        if len(rates) < 4:
            return math.inf
        low, middle, high = statistics.quantiles(rates, n=4)
        return 1.57 * (high - low) / math.sqrt(len(rates)) / middle


def save_result(result: Result, folder: Path) -> Path:
    """Write `result.json`; it appears whole or not at all."""
    path = folder / RESULT_FILE
    content = asdict(result) | {"summary": result.summary()}
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1))
    partial.replace(path)
    return path


def load_result(path: str | Path) -> Result:
    """Read a result from its file, or from the folder that holds it.

    Raises:
        ValueError: there is none, or it is of another format.
    """
    path = Path(path)
    path = path / RESULT_FILE if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"there is no result {path}; `rb bench train --out FOLDER` writes one")
    try:
        tree = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        found = tree.get("format") if isinstance(tree, dict) else None
        raise ValueError(f"{path} is no result of `rb bench train` in format {FORMAT} (found {found}); measure it anew")
    return _from_tree(tree)


def _from_tree(tree: Mapping[str, Any]) -> Result:
    fields = {name: value for name, value in tree.items() if name != "summary"}
    timeline = tuple(
        StageTimeline(
            stage["rank"], stage["pp_rank"], stage["pipeline"], tuple(Span(**span) for span in stage["spans"])
        )
        for stage in tree["timeline"]
    )
    return Result(
        **fields
        | {
            "steps": tuple(StepFigures(**step) for step in tree["steps"]),
            "ranks": tuple(RankFigures(**rank) for rank in tree["ranks"]),
            "timeline": timeline,
            "balance": Balance(**tree["balance"]),
            "peak": Peak(**tree["peak"]),
            "baseline": Baseline(**tree["baseline"]) if tree["baseline"] else None,
        }
    )


def versions() -> dict[str, str]:
    """Python and the packages that a step runs on."""
    from megatron_rb.platform.health import version_of  # imports torch

    found = {"python": host.python_version()}
    return found | {name: version for name in PACKAGES if (version := version_of(name))}
