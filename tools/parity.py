"""Compare this stack with transformers on the same samples: blocks, logits, gradients."""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path

from megatron_rb.checkpoint.conversion.verify import find_side
from megatron_rb.config.derive import check_tp_size
from megatron_rb.config.schema import Config, ParallelConfig
from megatron_rb.launch.workers import start_workers
from megatron_rb.parity.report import print_report, read_layout, read_samples, run_parity
from megatron_rb.parity.samples import draw_samples
from megatron_rb.parity.spec import ParitySpec, parity_config
from megatron_rb.shapes.shape import load_shape

TRACE = "megatron_rb.parity.stack:write_trace"


def main(argv: list[str]) -> int:
    """0 when every logit and gradient is within its tolerance, 1 when not."""
    options = _parser().parse_args(argv)
    config = _config(options)
    weights = find_side(options.weights or options.hf)
    spec = ParitySpec(str(weights.checkpoint or weights.path), options.grads)
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        shape = load_shape(options.hf)
        file = options.samples
        samples = read_samples(file, options.hf, shape, Path(folder)) if file else draw_samples(shape, options.seed)
        ours, rows = run_parity(Path(folder), config, spec, samples, partial(start_workers, TRACE))
    print_report(rows)
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(row) for row in rows], indent=2))
    if options.dump and ours.logits is not None:
        from safetensors.torch import save_file

        save_file({"logits": ours.logits.contiguous()}, options.dump)
    return 0 if all(row.passed is not False for row in rows) else 1


def _config(options: argparse.Namespace) -> Config:
    shape = load_shape(options.hf)
    check_tp_size(options.tp, shape)
    layout = read_layout(options.layout, shape, options.pp)
    parallel = ParallelConfig(
        options.tp, layout.pp_size, options.cp, str(layout), sequence_parallel=options.sequence_parallel
    )
    return parity_config(options.hf, parallel)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rb parity", description=__doc__)
    parser.add_argument("--hf", required=True, metavar="DIR", help="Hugging Face folder")
    parser.add_argument(
        "--weights",
        default="",
        metavar="DIR",
        help="checkpoint, run (its newest one) or Hugging Face folder the stack reads instead of --hf",
    )
    parser.add_argument("--layout", default="", metavar="TEXT", help="e.g. 'P v*3 | v*1 M E t*4 L'; default one stage")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel degree")
    parser.add_argument("--pp", type=int, default=0, metavar="N", help="pipeline ranks; default one per slice")
    parser.add_argument("--cp", type=int, default=1, metavar="N", help="context-parallel degree")
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--samples", default="", metavar="FILE", help="jsonl of conversations; default random samples")
    parser.add_argument("--seed", type=int, default=7, help="of the random samples")
    parser.add_argument("--grads", action="store_true", help="compare gradients too")
    parser.add_argument("--json", default="", metavar="FILE", help="write the comparison")
    parser.add_argument("--dump", default="", metavar="FILE", help="write the stack's logits as safetensors")
    return parser
