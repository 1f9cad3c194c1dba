"""Tables of commands: what each word does, in a line, and how it is run."""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple


class Command(NamedTuple):
    """A word of the command line."""

    summary: str
    """The first line of its module's docstring."""
    run: Callable[[list[str]], int]
    """Takes the words after its own and returns the exit code. It imports its module when it is called: a table of
    commands must not wait for torch."""


def listing(commands: Mapping[str, Command]) -> list[str]:
    """A line for each command, the summaries below one another."""
    width = max(map(len, commands), default=0)
    return [f"  {word:<{width}}  {command.summary}" for word, command in commands.items()]


def run_subcommand(parser: ArgumentParser, commands: Mapping[str, Command], argv: Sequence[str]) -> int:
    """Run the command that the parser reads as `what`, with the words that the parser does not know.

    The parser's own help lists the commands.
    """
    parser.epilog, parser.formatter_class = "\n".join(listing(commands)), RawDescriptionHelpFormatter
    options, rest = parser.parse_known_args(argv)
    return commands[options.what].run(rest)
