"""An evaluation as one HTML page that stands alone: table, and pictures with true and predicted points drawn in."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from megatron_rb.evaluation import tracespatial, truth
from megatron_rb.evaluation.benchmark_files import image_paths
from megatron_rb.evaluation.scoring import HALF, Scored
from megatron_rb.evaluation.truth import Parse
from megatron_rb.spatial.answers import parse_points, parse_points_with_depth
from megatron_rb.spatial.points import GRID

TRUE, PREDICTED = "#00c853", "#ff1744"
WIDTH = 360
"""Pixels of a picture in the page."""
TRACES = ("trace_2d", "trace_3d", tracespatial.KIND)
PARSERS: Mapping[str, Parse] = {
    "pointing": parse_points, "trace_2d": parse_points,
    **dict.fromkeys(("uvd", "trace_3d", tracespatial.KIND), parse_points_with_depth),
}  # fmt: skip


def write_report(
    table: Mapping[str, Mapping[str, Any]], results: Sequence[Scored], questions: Sequence[Mapping[str, Any]],
    answers: Mapping[str, str], root: Path, out: Path, most_pictures: int = 60, curves: Sequence[Path] = (),
) -> None:  # fmt: skip
    """Write the page; pictures of the first questions of every kind, failed answers first.

    Args:
        curves: PNG files that are shown at the end, such as those of `rb value plot`.
    """
    by_id = {str(question["question_id"]): question for question in questions}
    chosen = _choose(results, most_pictures)
    cards = [_card(result, by_id[result.question_id], answers.get(result.question_id, ""), root) for result in chosen]
    drawn = [f'<img src="{_data_url(path.read_bytes())}">' for path in curves]
    failed = sum(bool(result.failure) for result in results)
    body = (
        f"<h1>Evaluation</h1><p>{len(results)} questions, {failed} answers could not be read and count as wrong. "
        f'<b style="color:{TRUE}">true</b>, <b style="color:{PREDICTED}">predicted</b>.</p>'
        f"{_table(table)}<div>{''.join(cards)}</div>{''.join(drawn)}"
    )
    style = (
        "body{font:14px sans-serif;margin:2em}td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ccc}"
        f"figure{{display:inline-block;vertical-align:top;width:{WIDTH}px;margin:.5em}}figcaption{{word-break:break-word}}"
    )
    out.write_text(f"<!doctype html><meta charset=utf-8><style>{style}</style>{body}", encoding="utf-8")


def draw(question: Mapping[str, Any], answer: str, root: Path) -> Image.Image | None:
    """The last picture of a question with the true and the predicted points or boxes; None without a picture.

    Where there is a mask, its edge is drawn as true.
    """
    paths = image_paths(question)
    try:
        with Image.open(root / paths[-1]) as opened:
            image = opened.convert("RGB")
    except (IndexError, OSError):  # none, missing, or broken: the card then says so in words
        return None
    _draw_mask(image, question, root)
    pen = ImageDraw.Draw(image)
    width = max(2, round(max(image.size) / WIDTH * 2))
    for shape, colour in ((_true_shape(question), TRUE), (_said_shape(question, answer), PREDICTED)):
        if shape is None:
            continue
        pixels = [tuple(point) for point in (shape / GRID * np.array(image.size)).tolist()]
        if truth.kind_of(question) == "box":
            pen.rectangle([*pixels[0], *pixels[1]], outline=colour, width=width)
            continue
        if len(pixels) > 1 and truth.kind_of(question) in TRACES:
            pen.line(pixels, fill=colour, width=width)
        for number, (x, y) in enumerate(pixels):
            filled = colour if number == 0 and truth.kind_of(question) in TRACES else None  # where a trace starts
            reach = 2 * width
            pen.ellipse([x - reach, y - reach, x + reach, y + reach], outline=colour, width=width, fill=filled)
    return image


def _draw_mask(image: Image.Image, question: Mapping[str, Any], root: Path) -> None:
    if "mask_path" not in question or truth.kind_of(question) not in ("pointing", "uvd"):
        return
    mask = truth.mask_of(question, root) >= HALF
    inner = mask.copy()
    for axis in (0, 1):
        for step in (1, -1):
            inner &= np.roll(mask, step, axis=axis)
    edge = Image.fromarray(mask & ~inner).resize(image.size)
    image.paste(TRUE, mask=edge)


def _true_shape(question: Mapping[str, Any]) -> np.ndarray | None:
    """`[n, 2]` in 0-1000; two corners for a box. None where only the mask says what is true."""
    kind = truth.kind_of(question)
    try:
        if kind == "box":
            return truth.true_box(question).reshape(2, 2)
        return truth.true_points(question, PARSERS[kind])[:, :2] if kind in PARSERS else None
    except ValueError:
        return None


def _said_shape(question: Mapping[str, Any], answer: str) -> np.ndarray | None:
    kind = truth.kind_of(question)
    if kind == "box":
        box = truth.read_box(question, answer)
        return box.box.reshape(2, 2) if box.ok else None
    if kind not in PARSERS:
        return None
    read = truth.read_points(question, answer, PARSERS[kind])
    return read.points[:, :2] if read.ok else None


def _choose(results: Sequence[Scored], most: int) -> list[Scored]:
    kinds = sorted({result.kind for result in results})
    share = max(1, most // max(len(kinds), 1))
    chosen = []
    for kind in kinds:
        group = [result for result in results if result.kind == kind]
        chosen += sorted(group, key=lambda result: not result.failure)[:share]
    return chosen


def _card(result: Scored, question: Mapping[str, Any], answer: str, root: Path) -> str:
    image = draw(question, answer, root)
    picture = ""
    if image is not None:
        image.thumbnail((WIDTH, WIDTH))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        picture = f'<img src="{_data_url(buffer.getvalue())}" width="{WIDTH}">'
    elif image_paths(question):
        picture = f"<p>{html.escape(image_paths(question)[-1])} cannot be shown</p>"
    verdict = f"failed: {result.failure}" if result.failure else f"score {result.score:.3f}"
    lines = [
        f"{result.kind} {result.question_id}: {verdict}",
        f"true: {question.get('answer')}",
        f"said: {answer[:300]}",
    ]
    return f"<figure>{picture}<figcaption>{'<br>'.join(map(html.escape, lines))}</figcaption></figure>"


def _table(table: Mapping[str, Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for entry in table.values() for name in entry if name != "problems"))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("kind", *names, "problems"))
    rows = "".join(
        f"<tr><td>{html.escape(kind)}</td>"
        + "".join(f"<td>{_number(entry.get(name))}</td>" for name in names)
        + f"<td>{html.escape(', '.join(f'{n} {why}' for why, n in entry.get('problems', {}).items()))}</td></tr>"
        for kind, entry in table.items()
    )
    return f"<table><tr>{head}</tr>{rows}</table>"


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()
