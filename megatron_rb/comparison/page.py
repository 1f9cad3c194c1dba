"""A report as one HTML page that stands alone: headings, paragraphs, tables and pictures."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment

_PAGE = """<!doctype html><meta charset=utf-8><title>{{ title }}</title>
<style>body{font:15px sans-serif;margin:2em;max-width:75em}td,th{padding:.2em .8em;text-align:right;
border-bottom:1px solid #ccc}td:first-child,th:first-child{text-align:left}img{max-width:100%}
.bad{background:#fdd}.good{color:#070}</style>
<h1>{{ title }}</h1>
{% for section in sections %}{% if section.heading %}<h2>{{ section.heading }}</h2>{% endif %}
{% for line in section.lines %}<p>{{ line }}</p>{% endfor %}
{% if section.rows %}<table><tr>{% for cell in section.head %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in section.rows %}<tr{% if loop.index0 in section.marked %} class=bad{% endif %}>
{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>{% endif %}
{% for picture in section.pictures %}<img src="data:image/png;base64,{{ picture }}">{% endfor %}
{% endfor %}"""


@dataclass(frozen=True)
class PageSection:
    """A part of the page."""

    heading: str = ""
    lines: Sequence[str] = ()
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    marked: frozenset[int] = frozenset()
    """Numbers of the rows that stand out."""
    images: Sequence[Path] = ()
    """PNG files."""
    pictures: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.pictures.extend(base64.b64encode(path.read_bytes()).decode() for path in self.images)


def write_page(path: Path, title: str, sections: Sequence[PageSection]) -> None:
    """Write the page; it appears whole or not at all."""
    text = Environment(autoescape=True).from_string(_PAGE).render(title=title, sections=sections)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
