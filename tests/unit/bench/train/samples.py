"""A mix for tiny models, and results written by hand."""

from __future__ import annotations

from dataclasses import replace

from megatron_rb.bench.train.result import SECTIONS, Peak, RankFigures, Result, StepFigures
from megatron_rb.data.mixes import Mix, SampleKind
from megatron_rb.metrics.balance import Balance
from megatron_rb.metrics.timeline import Span, StageTimeline

MIX = Mix(
    "test",
    "for tests",
    seq_length=96,
    max_patches=512,
    micro_batches=2,
    samples=60,
    kinds=(
        SampleKind(share=0.5, images=(1, 2), side=(16, 48), text_tokens=(4, 8, 16)),
        SampleKind(share=0.2, frames=(2, 4), side=(16, 24), text_tokens=(4, 8, 16)),
        SampleKind(share=0.3, text_tokens=(4, 12, 30)),
    ),
)


def result(seconds: list[float], **changes) -> Result:
    """Steps of 1,000 tokens and 4 TFLOP on two devices."""
    steps = tuple(StepFigures(s, 0.0, 10, 1000, 300, 400, 4e12) for s in seconds)
    ranks = tuple(
        RankFigures(rank, rank, "blocks", dict.fromkeys(SECTIONS, 0.1), 0.25, 10**9 * (rank + 1)) for rank in range(2)
    )
    timeline = tuple(StageTimeline(rank, rank, 0, (Span("forward", 0.0, 1.0),)) for rank in range(2))
    found = Result(
        date="2026-01-31",
        versions={"torch": "2.13"},
        device={"platform": "cuda", "device": "H200"},
        devices=2,
        model={"name": "m", "layers": 2},
        mix={"name": "test", "seq_length": 96, "max_patches": 512},
        settings={"dtype": "bf16", "threads": 1, "layout": "P v | v M E t L"},
        warmup=1,
        steps=steps,
        ranks=ranks,
        timeline=timeline,
        loads=[[[90, 40], [80, 50]]],
        balance=Balance(0.9, 1.0, 1.1, 1.0, 1.0, 1.1, 0.9),
        peak=Peak(1e13, "stated"),
    )
    return replace(found, **changes)
