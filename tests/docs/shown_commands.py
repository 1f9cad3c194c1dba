"""The command lines that README, CONTRIBUTING and docs/ show, read from their fenced blocks."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PAGES = (
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
    *sorted((REPOSITORY / "examples").glob("*/README.md")),
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = ("bash", "console", "sh", "shell")
PROMPT = "$ "


@dataclass(frozen=True)
class Shown:
    """One command of a page, without its remark; a line that goes on is one command."""

    page: str
    line: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.line)


@dataclass(frozen=True)
class Session:
    """A command with what it answers, as it stands behind a prompt."""

    line: str
    answer: str


def shown_commands() -> list[Shown]:
    """Every command of every page, in order."""
    return [Shown(page.name, line) for page in PAGES for line in _commands(page.read_text(encoding="utf-8"))]


def sessions() -> list[Session]:
    """Every command that is shown behind a prompt, with the lines below it."""
    found = []
    for page in PAGES:
        for _, body in FENCE.findall(page.read_text(encoding="utf-8")):
            parts = body.split(PROMPT)[1:] if body.startswith(PROMPT) else []
            found += [Session(*part.strip().split("\n", 1)) for part in parts]
    return found


def _commands(text: str) -> Iterator[str]:
    for language, body in FENCE.findall(text):
        if language in SHELL:
            lines = body.replace("\\\n", " ").splitlines()
            yield from filter(None, map(_without_remark, lines))


def _without_remark(line: str) -> str:
    """The line up to its `#`, blanks between words made one."""
    bare = re.split(r"(?:^|\s)#\s", line, maxsplit=1)[0]
    return " ".join(bare.removeprefix(PROMPT).split())
