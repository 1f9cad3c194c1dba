"""The page of all settings, made of the schema: `python -m megatron_rb.config.settings_page docs/settings.md`."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rb.config import schema
from megatron_rb.config.compose import group_choices
from megatron_rb.config.rules import ABOVE_ZERO, CHOICES, DECAYS, LEAST, RANGES
from megatron_rb.config.schema import Config

INTRODUCTION = """# Settings

Every setting of a run. `make settings` writes this page from
`megatron_rb/config/schema.py`; the same names stand in the files of `conf/` and in a run's `config.yaml`.

On the command line `section.setting=value` sets a value; `group=choice` takes a file of `conf/<group>/`, which sets
several of them, so that the default of a run may be another than the one below. Texts are written as they are, lists
`[a,b]`, mappings `{a: b}`; several values with commas between them are a sweep.

```bash
rb launch experiment=demo optimizer.lr=5e-4 platform.env.NAME=value action=dryrun
```
"""
HEADER = ("| setting | type | default | values | meaning |", "|---|---|---|---|---|")
CODE = re.compile(r"`[^`]+`")


@dataclass(frozen=True)
class SettingLine:
    """One setting."""

    key: str
    declared: Any
    default: Any
    meaning: str


@dataclass(frozen=True)
class SettingsSection:
    """Settings that share the first part of their keys."""

    prefix: str
    """Empty for those without a section."""
    lines: tuple[SettingLine, ...]


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        raise SystemExit("usage: python -m megatron_rb.config.settings_page FILE")
    Path(argv[0]).write_text(page(), encoding="utf-8")
    return 0


def page() -> str:
    """The whole page as Markdown."""
    return "\n".join([INTRODUCTION, *(_section_text(section) for section in sections())])


def sections() -> Iterator[SettingsSection]:
    """Every section of the schema, in its order; a section within another follows it."""
    return _sections(Config, "")


def _sections(section: type, prefix: str) -> Iterator[SettingsSection]:
    types, meanings = typing.get_type_hints(section), documentation(section)
    inner = [item for item in dataclasses.fields(section) if dataclasses.is_dataclass(types[item.name])]
    own = [item for item in dataclasses.fields(section) if item not in inner]
    lines = [SettingLine(prefix + item.name, types[item.name], _default(item), meanings[item.name]) for item in own]
    if lines:
        yield SettingsSection(prefix.rstrip("."), tuple(lines))
    for item in inner:
        yield from _sections(types[item.name], f"{prefix}{item.name}.")
    for item in own:
        named = (typing.get_args(types[item.name]) or (None,))[-1]
        if dataclasses.is_dataclass(named):
            yield from _sections(typing.cast(type, named), f"{prefix}{item.name}.NAME.")


def documentation(section: type) -> dict[str, str]:
    """For every field the text that stands under it, on one line; empty where there is none."""
    body = next(node.body for node in _classes() if node.name == section.__name__)
    texts = {}
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            texts[node.target.id] = _docstring(after)
    return texts


def _classes() -> list[ast.ClassDef]:
    return [node for node in ast.parse(inspect.getsource(schema)).body if isinstance(node, ast.ClassDef)]


def _docstring(node: ast.stmt | None) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return " ".join(node.value.value.split())
    return ""


def _default(item: dataclasses.Field[Any]) -> Any:
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def _section_text(section: SettingsSection) -> str:
    title = f"## {section.prefix}" if section.prefix else "## The run"
    rows = [_row(line) for line in section.lines]
    return "\n".join([title, "", *_files_of(section.prefix), *HEADER, *rows, ""])


def _files_of(group: str) -> list[str]:
    names = group_choices(group) if group else []
    return [f"Files: {', '.join(f'`{group}={name}`' for name in names)}.", ""] if names else []


def _row(line: SettingLine) -> str:
    cells = (f"`{line.key}`", f"`{_type_name(line.declared)}`", _written(line.default), values(line.key), line.meaning)
    return f"| {' | '.join(map(_cell, cells))} |"


def _type_name(declared: Any) -> str:
    if isinstance(declared, type) and not typing.get_args(declared):
        return "section" if dataclasses.is_dataclass(declared) else declared.__name__
    origin, inner = typing.get_origin(declared), typing.get_args(declared)
    return f"{origin.__name__}[{', '.join(map(_type_name, inner))}]" if inner and origin else str(declared)


def _written(default: Any) -> str:
    """As the command line takes it."""
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return "`''`" if default == "" else f"`{default}`"


def values(key: str) -> str:
    """What `rules` allows for a setting; empty = whatever its type allows."""
    if key in CHOICES:
        return ", ".join(f"`{name}`" for name in CHOICES[key])
    if key in RANGES:
        low, high = RANGES[key]
        return f"{low:g} to {high:,}"
    if key in DECAYS:
        return "at least 0, below 1"
    if key in LEAST:
        return f"at least {LEAST[key]:g}"
    return "above 0" if key in ABOVE_ZERO else ""


def _cell(text: str) -> str:
    """A bar ends a cell, in code too, unless it is written as an entity."""
    return CODE.sub(lambda code: _as_html(code[0]) if "|" in code[0] else code[0], text)


def _as_html(code: str) -> str:
    inside = code.strip("`").replace("&", "&amp;").replace("<", "&lt;")
    # Between HTML tags Markdown still reads stars and underscores.
    return f"<code>{inside.translate({ord(sign): f'&#{ord(sign)};' for sign in '|*_'})}</code>"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
