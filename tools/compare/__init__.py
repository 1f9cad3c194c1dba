"""Compare two runs of one recipe, or the tensors inside one step of each: runs, capture, numerics."""

from __future__ import annotations

import argparse

from megatron_rb.config.commands import Command, run_subcommand


def main(argv: list[str]) -> int:
    is_own_help = not argv or argv[0] not in COMMANDS
    parser = argparse.ArgumentParser(prog="rb compare", description=__doc__, add_help=is_own_help)
    parser.add_argument("what", choices=COMMANDS, help="two loss curves; a step into files; two such steps")
    return run_subcommand(parser, COMMANDS, argv)


def _runs(argv: list[str]) -> int:
    from megatron_rb.tools.compare.runs import main as run

    return run(argv)


def _capture(argv: list[str]) -> int:
    from megatron_rb.tools.compare.capture import main as run

    return run(argv)


def _numerics(argv: list[str]) -> int:
    from megatron_rb.tools.compare.numerics import main as run

    return run(argv)


COMMANDS = {
    "runs": Command(
        "Do two runs of one recipe on different hardware agree? 0 they do, 1 they differ, 3 too noisy to tell.", _runs
    ),
    "capture": Command(
        "Run the first steps of a recipe on this machine and write down what passes its blocks.", _capture
    ),
    "numerics": Command(
        "Where do two captures of one step part, and is it rounding or a defect? 0 no defect, 1 a defect.", _numerics
    ),
}
