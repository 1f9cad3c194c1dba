"""Measure training steps, packing, conversions, recovery, data, kernels and captures; compare two results."""

from __future__ import annotations

import argparse

from megatron_rb.config.commands import Command, run_subcommand


def main(argv: list[str]) -> int:
    # What comes after the first word is for the benchmark, its --help too.
    parser = argparse.ArgumentParser(prog="rb bench", description=__doc__, add_help=argv[:1] in (["-h"], ["--help"]))
    parser.add_argument("what", nargs="?", choices=COMMANDS, default="step", help="what is measured (default: step)")
    return run_subcommand(parser, COMMANDS, argv)


def _device(argv: list[str]) -> int:
    from megatron_rb.tools.bench.device import main as run

    return run(argv)


def _step(argv: list[str]) -> int:
    from megatron_rb.tools.bench.step import main as run

    return run(argv)


def _train(argv: list[str]) -> int:
    from megatron_rb.tools.bench.train import main as run

    return run(argv)


def _compare(argv: list[str]) -> int:
    from megatron_rb.tools.bench.compare import main as run

    return run(argv)


def _packing(argv: list[str]) -> int:
    from megatron_rb.tools.bench.packing import main as run

    return run(argv)


def _convert(argv: list[str]) -> int:
    from megatron_rb.tools.bench.convert import main as run

    return run(argv)


def _launch(argv: list[str]) -> int:
    from megatron_rb.tools.bench.launch import main as run

    return run(argv)


def _data(argv: list[str]) -> int:
    from megatron_rb.tools.bench.data import main as run

    return run(argv)


def _kernels(argv: list[str]) -> int:
    from megatron_rb.tools.bench.kernels import main as run

    return run(argv)


def _blocks(argv: list[str]) -> int:
    from megatron_rb.tools.bench.blocks import main as run

    return run(argv)


def _plan(argv: list[str]) -> int:
    from megatron_rb.tools.bench.plan import main as run

    return run(argv)


def _numerics(argv: list[str]) -> int:
    from megatron_rb.tools.bench.numerics import main as run

    return run(argv)


COMMANDS = {
    "device": Command(
        "The first ten minutes on a device: steps and their memory, logits, kernels, speed, a resume; one folder to "
        "keep.",
        _device,
    ),
    "step": Command("Time a training step beside transformers' own on the same small models.", _step),
    "train": Command(
        "Measure training steps on a declared mix of samples, or on your data, and write a report.", _train
    ),
    "compare": Command(
        "Compare two results of `rb bench train`; exit code 1 when B is slower than A beyond limit and noise.", _compare
    ),
    "packing": Command(
        "Pack a mix for many ranks: how full and how even micro-batches are, beside next-fit and first-fit.", _packing
    ),
    "convert": Command(
        "Time imports and exports of checkpoints of real shapes beside `cp` of the same files, and their peak memory.",
        _convert,
    ),
    "launch": Command("Time how the launcher overcomes faults, on an emulated Slurm cluster of this machine.", _launch),
    "data": Command(
        "Measure hop pairs, reconstruction, parsers and 3-D scoring on one core, beside what is aimed at.", _data
    ),
    "kernels": Command(
        "Time the kernels as shares of a GPU's measured ceilings, on a CPU beside transformers; --aot counts "
        "machine code.",
        _kernels,
    ),
    "blocks": Command(
        "Time single blocks on the present device and write a calibration for `rb plan ... calibration=FILE`.", _blocks
    ),
    "plan": Command(
        "Measure the planned cut beside hand-made ones on two CPU processes; predicted and measured ratio "
        "side by side.",
        _plan,
    ),
    "numerics": Command(
        "Time what a capture adds to a step, and the comparison of two captures in the shapes of a real model.",
        _numerics,
    ),
}
