"""Time single blocks on the present device and write a calibration for `rb plan ... calibration=FILE`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from megatron_rb.app.planning import shape_of
from megatron_rb.app.session import adapt_megatron, session_of
from megatron_rb.config.schema import Config, ModelConfig, PlatformConfig
from megatron_rb.planner.cost import Pricing
from megatron_rb.planner.device import load_device


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    platform = adapt_megatron(options.platform)

    from megatron_rb.bench.blocks import calibration_of, time_blocks  # imports megatron-core

    pricing = Pricing(load_device(options.device), options.dtype)
    print(f"{'block':<14}{'pass':<10}{'tokens':>8}{'patches':>9}{'nominal ms':>12}{'measured ms':>13}{'ratio':>8}")

    def tell(item) -> None:
        ratio = item.measured / item.nominal
        print(
            f"{item.part:<14}{item.direction:<10}{item.tokens:>8}{item.patches:>9}{item.nominal * 1e3:>12.3f}"
            f"{item.measured * 1e3:>13.3f}{ratio:>8.2f}",
            flush=True,
        )

    sizes = [(tokens, tokens) for tokens in options.tokens]
    alone = PlatformConfig(platform.name, threads_per_rank=options.threads)
    config = Config(model=ModelConfig(dtype=options.dtype), platform=alone)
    with session_of(config, shape_of(options.model)) as session:
        times = time_blocks(session, pricing, sizes, options.rounds, tell)
    info = ", ".join(f"{name} {value}" for name, value in platform.info().items())
    calibration_of(times, pricing.device, options.dtype, f"{info}, {options.threads} thread").save(Path(options.out))
    print(f"written to {options.out}: rb plan ... cluster={options.device} calibration={options.out}")
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(item) for item in times], indent=1))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rb bench blocks", description=__doc__)
    parser.add_argument("--model", required=True, help="folder with config.json, or a published name: RoboBrain2.0-7B")
    parser.add_argument("--device", required=True, help="description to correct: a name of conf/device or a yaml file")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--platform", default="auto", help="cpu, cuda or musa; auto = what is there")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384], metavar="N", help="and patches")
    parser.add_argument("--rounds", type=int, default=10, metavar="K", help="timed rounds")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads on CPU")
    parser.add_argument("--out", default="calibration.json", metavar="FILE", help="the calibration")
    parser.add_argument("--json", default="", metavar="FILE", help="every time")
    return parser
