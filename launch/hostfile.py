"""Host files: a line `host slots=8 type=A800` per machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_rb.launch.job import Host


def read_hosts(path: Path) -> tuple[Host, ...]:
    """The machines of a host file, in its order; empty lines and `#` comments are left out.

    Raises:
        ValueError: names file and line of what cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"there is no host file {path}; give one with cluster.ssh.hostfile=FILE")
    hosts = [
        _parse(words, f"{path}, line {number}")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if (words := line.partition("#")[0].split())
    ]
    return check_hosts(hosts, str(path))


def check_hosts(hosts: Sequence[Host], origin: str) -> tuple[Host, ...]:
    """The hosts as they are; raises ValueError when there is none, or one twice."""
    names = [host.name for host in hosts]
    if not names:
        raise ValueError(f"{origin} names no host; write a line `host slots=8` per machine")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{origin} names {', '.join(twice)} more than once; a machine has one line")
    return tuple(hosts)


def _parse(words: Sequence[str], place: str) -> Host:
    values = {"slots": "0", "type": ""}
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if key not in values or not equals or not value:
            raise ValueError(f"{place}: '{word}' is not known; a line is `host slots=8 type=NAME`")
        values[key] = value
    if not values["slots"].isdigit():
        raise ValueError(f"{place}: slots must be a whole number, got '{values['slots']}'")
    return Host(words[0], int(values["slots"]), values["type"])
