"""Dense value: `label` episodes into hop samples, `score` episodes with answers of a model, `plot` the curves."""

from __future__ import annotations

import argparse

from megatron_rb.config.commands import Command, run_subcommand


def main(argv: list[str]) -> int:
    is_own_help = not argv or argv[0] not in COMMANDS
    parser = argparse.ArgumentParser(prog="rb value", description=__doc__, add_help=is_own_help)
    parser.add_argument("what", choices=COMMANDS)
    return run_subcommand(parser, COMMANDS, argv)


def _label(argv: list[str]) -> int:
    from megatron_rb.tools.value.label import main as run

    return run(argv)


def _score(argv: list[str]) -> int:
    from megatron_rb.tools.value.score import main as run

    return run(argv)


def _plot(argv: list[str]) -> int:
    from megatron_rb.tools.value.plot import main as run

    return run(argv)


COMMANDS = {
    "label": Command("Key-framed episodes -> hop samples for training.", _label),
    "score": Command(
        "Score episodes: ask a model about pairs of frames, or take recorded answers, and write progress curves.",
        _score,
    ),
    "plot": Command("Draw progress curves with the frames below, one PNG per episode.", _plot),
}
