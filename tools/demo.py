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

from megatron_rb.bench.demo_scores import DemoRequest, write_demo_questions
from megatron_rb.bench.demo_summary import demo_summary
from megatron_rb.config.compose import load_config

ROOT = Path("runs/demo")
PARITY_SAMPLES = 6
HOPS_PER_EPISODE = 8
ANSWER_TOKENS = 28
"""A point with its depth needs about twenty."""


def main(argv: list[str]) -> int:
    """Run every step as the command a user would type, then write `runs/demo/summary.json`."""
    parser = argparse.ArgumentParser(prog="rb demo", description=__doc__)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="changes to the recipe experiment=demo")
    parser.add_argument(
        "--questions", type=int, default=120, metavar="N", help="about points, and about depth (120 each)"
    )
    parser.add_argument("--episodes", type=int, metavar="N", help="that are judged for progress (all)")
    args = parser.parse_args(argv)
    settings, request = ["experiment=demo", *args.settings], DemoRequest(args.questions, args.episodes)
    config, started = load_config(settings), time.monotonic()
    if config.run_dir != str(ROOT):
        raise ValueError(
            f"rb demo works in {ROOT}, the settings ask for {config.run_dir}; use rb launch for other runs"
        )
    made = ("hf", "data", "imported", "eval", "export", "checkpoints", "metrics.jsonl", "ledger.jsonl", "index")
    for old in made:
        _remove(ROOT / old)
    tasks = ("--tasks", "pointing", "uvd", "hop", "--hops-per-episode", HOPS_PER_EPISODE)
    _rb("demo-data", *tasks, "--out", ROOT / "data")
    _rb("demo-model", "--texts", ROOT / "data/train.jsonl", "--out", ROOT / "hf")
    _rb("convert", "import", "--hf", ROOT / "hf", "--out", ROOT / "imported")
    _rb("launch", *settings)
    write_demo_questions(ROOT / "data", request, ROOT / "data/questions.jsonl")
    _rb(
        "eval",
        "--ckpt",
        ROOT,
        "--data",
        ROOT / "data/questions.jsonl",
        "--out",
        ROOT / "eval",
        "--processes",
        2,
        "--batch",
        40,
        "--max-new-tokens",
        ANSWER_TOKENS,
    )
    _rb("convert", "export", "--ckpt", ROOT / "checkpoints", "--out", ROOT / "export")
    newest = max((ROOT / "checkpoints").glob("step_*"))
    few = ROOT / "data/parity.jsonl"
    few.write_text("".join((ROOT / "data/heldout.jsonl").read_text().splitlines(True)[:PARITY_SAMPLES]))
    _rb(
        "parity",
        "--hf",
        ROOT / "export",
        "--weights",
        newest,
        "--samples",
        few,
        "--json",
        ROOT / "parity.json",
        "--tp",
        config.parallel.tp_size,
        "--layout",
        config.parallel.layout,
    )
    summary = demo_summary(ROOT, config, request, round(time.monotonic() - started, 1))
    (ROOT / "summary.json").write_text(json.dumps(summary, indent=2))
    print(json.dumps(summary, indent=2))
    return 0


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
