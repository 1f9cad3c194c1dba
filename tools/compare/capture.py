"""Run the first steps of a recipe on this machine and write down what passes its blocks."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_rb.app.capture_config import CAPTURE, capture_config
from megatron_rb.app.planning import maybe_plan
from megatron_rb.config.compose import CONFIG_FILE, load_config, save_config
from megatron_rb.config.derive import derive
from megatron_rb.launch.prepare import check_paths, run_environment
from megatron_rb.launch.workers import start_workers
from megatron_rb.shapes.shape import load_shape


def main(argv: list[str]) -> int:
    """0 when all steps are captured, else the exit code of the rank that failed."""
    options = _parser().parse_intermixed_args(argv)
    if options.steps < 1:
        raise ValueError(f"--steps {options.steps}: capture at least one step")
    out = Path(options.out).absolute()
    if any(out.glob("step_*")):
        raise ValueError(f"{out} already holds captures; choose another --out, or remove it")
    config = maybe_plan(load_config(options.settings))
    derived = derive(config, load_shape(config.model.hf_path))
    check_paths(config, derived)
    config = capture_config(config, derived.init, out, options.steps)
    save_config(config, Path(config.run_dir) / CONFIG_FILE)
    threads, env = config.platform.threads_per_rank, run_environment(config)
    code = start_workers(CAPTURE, Path(config.run_dir), derived.world_size, threads, env)
    if code == 0:
        print(f"captures: {out}; copy the folder to where the other one is, then rb compare numerics A B")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rb compare capture", description=__doc__)
    parser.add_argument(
        "settings",
        nargs="+",
        metavar="key=value",
        help="as for rb launch; metrics.capture.rows and others say how much is kept, checkpoint.init which weights",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="gets a folder per captured step")
    parser.add_argument("--steps", type=int, default=1, metavar="N", help="steps to run and capture (default 1)")
    return parser
