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

from megatron_rb.data.answer_file import write_whole
from megatron_rb.data.media import load_picture
from megatron_rb.data.problems import BadSample
from megatron_rb.evaluation.benchmark_files import image_paths
from megatron_rb.scores import tracespatial, truth
from megatron_rb.scores.scoring import HALF, Scored
from megatron_rb.scores.truth import Parse
from megatron_rb.spatial.answers import parse_points, parse_points_with_depth
from megatron_rb.spatial.points import GRID

TRUE, PREDICTED = "#00c853", "#ff1744"
WIDTH = 360
"""Pixels of a picture in the page."""
SHARED = ("kind", "questions", "failed", "score")
"""Columns of the table; what only some kinds have stands in one column."""
TRACES = ("trace_2d", "trace_3d", tracespatial.KIND)
PARSERS: Mapping[str, Parse] = {
    "pointing": parse_points,
    "trace_2d": parse_points,
    **dict.fromkeys(("uvd", "trace_3d", tracespatial.KIND), parse_points_with_depth),
}


def write_report(
    table: Mapping[str, Mapping[str, Any]],
    results: Sequence[Scored],
    questions: Sequence[Mapping[str, Any]],
    answers: Mapping[str, str],
    root: Path,
    out: Path,
    most_pictures: int = 60,
    curves: Sequence[Path] = (),
) -> None:
    """Write the page; pictures of the first questions of every kind, failed answers first.

    Args:
        curves: PNG files that are shown at the end, such as those of `rb value plot`.
    """
    by_id = {str(question["question_id"]): question for question in questions}
    sections = []
    for kind, chosen in _choose(results, most_pictures).items():
        ids = [result.question_id for result in chosen]
        cards = (_card(result, by_id[key], answers.get(key, ""), root) for result, key in zip(chosen, ids, strict=True))
        of_all = sum(result.kind == kind for result in results)
        note = f" <small>{len(chosen)} of {of_all}, failed ones first</small>" if len(chosen) < of_all else ""
        sections.append(f"<h2>{html.escape(kind)}{note}</h2><div>{''.join(cards)}</div>")
    drawn = [f'<p><img src="{_data_url(path.read_bytes())}" style="max-width:100%"></p>' for path in curves]
    failed = sum(bool(result.failure) for result in results)
    body = (
        f"<h1>Evaluation</h1><p>{len(results)} questions, {failed} answers could not be read and count as wrong. "
        f'<b style="color:{TRUE}">true</b>, <b style="color:{PREDICTED}">predicted</b>; a trace starts at its full '
        f"dot, a mask is drawn by its edge.</p>{_table(table)}{''.join(sections)}"
        f"{'<h2>progress</h2>' if drawn else ''}{''.join(drawn)}"
    )
    style = (
        "body{font:14px sans-serif;margin:2em;color:#222}table{border-collapse:collapse}"
        "td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ccc}"
        "td:first-child,td:nth-child(n+5){text-align:left}"
        f"figure{{display:inline-block;vertical-align:top;width:{WIDTH}px;margin:.5em}}"
        "figcaption{word-break:break-word;font-size:12px}small{color:#777;font-weight:normal}.failed{color:#b00}"
    )
    page = f"<!doctype html><meta charset=utf-8><title>Evaluation</title><style>{style}</style>{body}"
    write_whole(out, page.encode(errors="replace").decode())


def draw(question: Mapping[str, Any], answer: str, root: Path) -> Image.Image | None:
    """The last picture of a question with the true and the predicted points or boxes; None without a picture.

    Where there is a mask, its edge is drawn as true.
    """
    paths = image_paths(question)
    try:
        image = load_picture(root / paths[-1])
    except (IndexError, BadSample):  # none, missing, or broken: the card then says so in words
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


def _choose(results: Sequence[Scored], most: int) -> dict[str, list[Scored]]:
    """By kind an equal part of `most`, failed answers first."""
    kinds = sorted({result.kind for result in results})
    share = max(1, most // max(len(kinds), 1))
    groups = {kind: [result for result in results if result.kind == kind] for kind in kinds}
    return {kind: sorted(group, key=lambda result: not result.failure)[:share] for kind, group in groups.items()}


def _card(result: Scored, question: Mapping[str, Any], answer: str, root: Path) -> str:
    paths, image = image_paths(question), draw(question, answer, root)
    picture = ""
    if image is not None:
        picture = _img(image, WIDTH, WIDTH) if len(paths) < 2 else _strip(paths[:-1], image, root)
    elif paths:
        picture = f"<p>{html.escape(paths[-1])} cannot be shown</p>"
    failed = ' class="failed"' if result.failure else ""
    verdict = f"failed: {result.failure}" if result.failure else f"score {result.score:.3f}"
    further = ", ".join(f"{name} {value:.3f}" for name, value in result.measures.items() if not result.failure)
    lines = [f"true: {question.get('answer')}", f"said: {answer[:300]}", further]
    shown = "<br>".join(html.escape(line) for line in lines if line)
    head = f"<b>{html.escape(result.question_id)}</b> <span{failed}>{html.escape(verdict)}</span>"
    return f"<figure>{picture}<figcaption>{head}<br>{shown}</figcaption></figure>"


def _strip(paths: Sequence[str], last: Image.Image, root: Path) -> str:
    """All pictures of a question in their order, the last one with what is drawn in; at most four in a row."""
    side = WIDTH // min(len(paths) + 1, 4)
    shown = []
    for path in paths:
        try:
            shown.append(_img(load_picture(root / path), side, side))
        except BadSample:
            shown.append(f"<small>{html.escape(path)} cannot be shown</small>")
    return "".join([*shown, _img(last, side, side)])


def _img(image: Image.Image, width: int, height: int) -> str:
    small = image.copy()
    small.thumbnail((2 * width, 2 * height))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    scale = min(width / small.width, height / small.height)
    return f'<img src="{_data_url(buffer.getvalue())}" width="{round(small.width * scale)}">'


def _table(table: Mapping[str, Mapping[str, Any]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in (*SHARED, "further figures", "why failed"))
    return f"<table><tr>{head}</tr>{''.join(_row(kind, entry) for kind, entry in table.items())}</table>"


def _row(kind: str, entry: Mapping[str, Any]) -> str:
    further = ", ".join(f"{name} {_number(entry[name])}" for name in entry if name not in (*SHARED, "problems"))
    why = ", ".join(f"{count} {problem}" for problem, count in entry.get("problems", {}).items())
    cells = [kind, *(_number(entry[name]) for name in SHARED[1:]), further, why]
    return f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()
