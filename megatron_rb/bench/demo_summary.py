"""What a run of `rb demo` has come to, from the files that its commands wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_rb.bench.demo_scores import DemoRequest, evaluate_demo
from megatron_rb.config.derive import replica_size
from megatron_rb.config.schema import Config
from megatron_rb.data.answer_file import read_answers
from megatron_rb.evaluation.heldout import constant_loss

COMPARED = ("pointing_hit_rate", "depth_error_cm", "voc_plus", "voc_minus")
"""Scores that the constant answer has too."""


def demo_summary(root: Path, config: Config, request: DemoRequest, seconds: float) -> dict[str, Any]:
    """Losses, scores and the difference after the export.

    Args:
        root: folder of the demo.
        seconds: that it took.
    """
    records = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "step"]
    logits = next(row for row in json.loads((root / "parity.json").read_text()) if row["name"] == "logits")
    return {
        "layout": config.parallel.layout,
        "world_size": replica_size(config.parallel),
        "seconds": seconds,
        "train": {"steps": len(losses), "first_loss": losses[0], "final_loss": losses[-1]},
        "eval": {
            **_losses([record["values"] for record in records if record["kind"] == "eval"]),
            "constant_loss": constant_loss(config.data, str(root / "export"), root / "ledger.jsonl"),
            **_scores(root, request),
        },
        "export": {"max_abs_logit_diff": logits["max_abs"]},
    }


def _losses(evaluations: list[dict[str, float]]) -> dict[str, float]:
    first, last = evaluations[0], evaluations[-1]
    return {
        "untrained_loss": first["loss"],
        "trained_loss": last["loss"],
        "untrained_hop_loss": first["hop_loss"],
        "trained_hop_loss": last["hop_loss"],
    }


def _scores(root: Path, request: DemoRequest) -> dict[str, Any]:
    scores = evaluate_demo(root / "data", request, read_answers(root / "eval/answers.jsonl"))
    constant = {f"constant_{name}": value for name, value in scores["constant"].items() if name in COMPARED}
    return scores["model"] | constant
