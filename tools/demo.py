"""The main job on this machine: import, train in 4 processes, evaluate, export, reload with transformers."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from megatron_rb.config.compose import load_config

ROOT = Path("runs/demo")
PARITY_SAMPLES, POINTING_SAMPLES, SCORED_SAMPLES = 6, 120, 60


def main(argv: list[str]) -> int:
    """Run every step as the command a user would type, then write `runs/demo/summary.json`."""
    parser = argparse.ArgumentParser(prog="rb demo", description=__doc__)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="changes to the recipe experiment=demo")
    settings = ["experiment=demo", *parser.parse_args(argv).settings]
    config, started = load_config(settings), time.monotonic()
    if config.run_dir != str(ROOT):
        raise ValueError(
            f"rb demo works in {ROOT}, the settings ask for {config.run_dir}; use rb launch for other runs"
        )
    for old in ("hf", "data", "imported", "export", "checkpoints", "metrics.jsonl", "ledger.jsonl", "index", "eval"):
        _remove(ROOT / old)
    _rb("demo-data", "--tasks", "pointing", "uvd", "hop", "--out", ROOT / "data")
    _rb("demo-model", "--texts", ROOT / "data/train.jsonl", "--out", ROOT / "hf")
    _rb("convert", "import", "--hf", ROOT / "hf", "--out", ROOT / "imported")
    _rb("launch", *settings)
    _rb("convert", "export", "--ckpt", ROOT / "checkpoints", "--out", ROOT / "export")
    newest = max((ROOT / "checkpoints").glob("step_*"))
    few = ROOT / "data/parity.jsonl"
    few.write_text("".join((ROOT / "data/heldout.jsonl").read_text().splitlines(True)[:PARITY_SAMPLES]))
    _rb(
        "parity", "--hf", ROOT / "export", "--weights", newest, "--samples", few, "--json", ROOT / "parity.json",
        "--tp", config.parallel.tp_size, "--layout", config.parallel.layout,
    )  # fmt: skip
    summary = _summarise(config, started)
    (ROOT / "summary.json").write_text(json.dumps(summary, indent=2))
    print(json.dumps(summary, indent=2))
    return 0


def _summarise(config, started: float) -> dict:
    from megatron_rb.evaluation.answering import answer_with_transformers
    from megatron_rb.evaluation.demo_scores import evaluate_demo
    from megatron_rb.evaluation.heldout import constant_answers, pointing_hits

    ledger, export = ROOT / "ledger.jsonl", str(ROOT / "export")
    constant = constant_answers(config.data, export, ledger)
    hits = pointing_hits(config.data, export, ledger, POINTING_SAMPLES)
    answered = ROOT / "eval/answers.jsonl"
    scores = evaluate_demo(
        ROOT / "data",
        SCORED_SAMPLES,
        lambda rows: answer_with_transformers(rows, ROOT / "data", export, answered, 32, config.data),
    )
    records = [json.loads(line) for line in (ROOT / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "step"]
    evaluations = [record["values"]["loss"] for record in records if record["kind"] == "eval"]
    logits = next(row for row in json.loads((ROOT / "parity.json").read_text()) if row["name"] == "logits")
    return {
        "layout": config.parallel.layout,
        "world_size": config.parallel.tp_size * config.parallel.pp_size,
        "seconds": round(time.monotonic() - started, 1),
        "train": {"steps": len(losses), "first_loss": losses[0], "final_loss": losses[-1]},
        "eval": {
            "untrained_loss": evaluations[0],
            "constant_loss": constant.loss,
            "trained_loss": evaluations[-1],
            "pointing_hit_rate": hits.rate,
            "constant_pointing_hit_rate": constant.pointing.rate,
            "pointing_answers": hits.count,
            "pointing_unreadable": hits.unreadable,
        },
        "scores": scores,
        "export": {"max_abs_logit_diff": logits["max_abs"]},
    }


def _rb(*words: object) -> None:
    """Run one `rb` command and stop the demo when it fails."""
    command = [sys.executable, "-m", "megatron_rb.cli", *map(str, words)]
    print(f"\n$ rb {shlex.join(map(str, words))}", flush=True)
    code = subprocess.run(command).returncode
    if code:
        raise SystemExit(code)


def _remove(path: Path) -> None:
    """Take away what an earlier demo left, so that this one starts fresh."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
