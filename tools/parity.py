"""Compare this stack with transformers on the same samples: blocks, logits, gradients."""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path

from megatron_rb.launch.workers import start_workers
from megatron_rb.platform import get_platform
from megatron_rb.platform.mcore_shims import install_mcore_shims

WORKER = "megatron_rb.parity.worker"


def main(argv: list[str]) -> int:
    """0 when every logit and gradient is within its tolerance, 1 when not."""
    options = _parser().parse_args(argv)
    install_mcore_shims(get_platform("auto"))

    from megatron_rb.parity.report import print_report, run_parity

    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        ours, rows = run_parity(
            Path(folder),
            options.hf,
            weights=options.weights,
            layout_text=options.layout,
            tp_size=options.tp,
            pp_size=options.pp,
            sequence_parallel=options.sequence_parallel,
            cp_size=options.cp,
            samples_file=options.samples,
            grads=options.grads,
            seed=options.seed,
            start=partial(start_workers, WORKER),
        )
    print_report(rows)
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(row) for row in rows], indent=2))
    if options.dump and ours.logits is not None:
        from safetensors.torch import save_file

        save_file({"logits": ours.logits.contiguous()}, options.dump)
    return 0 if all(row.passed is not False for row in rows) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rb parity", description=__doc__)
    parser.add_argument("--hf", required=True, metavar="DIR", help="Hugging Face folder")
    parser.add_argument("--weights", default="", metavar="CKPT", help="checkpoint the stack reads instead of --hf")
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
