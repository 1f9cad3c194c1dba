"""What a question says about itself: its kind, its true answer, its pictures, the unit of coordinates.

Coordinates of answers are read in one of these ways and lead to 0-1000, so that nothing is compared across units:
`0-1000` (RoboBrain 2.5), `pixels` of the picture as it lies there, `shown-pixels` of the picture as the processor
resizes it (RoboBrain 2.0), `fractions` (0-1), and `flagevalmm`: pointing as that tool's own tasks read it, all else as
pixels. The truth of a question is in 0-1000 unless it says `"frame": "pixels"`; pixels are those of `size`, else of
`image_width` and `image_height`; what the model is shown is `shown_size`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np
from PIL import Image

from megatron_rb.data.colours import DeepColours, eight_bit
from megatron_rb.spatial.answers import FRACTIONS, BoxAnswer, PointsAnswer, parse_box
from megatron_rb.spatial.points import GRID, ImageSize
from megatron_rb.spatial.text_answers import parse_choice, parse_length, parse_number
from megatron_rb.value.answers import parse_score

Question = Mapping[str, Any]
Parse = Callable[[str, ImageSize | None], PointsAnswer]

ALIASES = {
    "point": "pointing",
    "numerical": "number",
    "object_abs_distance": "number",
    "object_counting": "number",
    "object_size_estimation": "number",
    "room_size_estimation": "number",
    **dict.fromkeys(
        (
            "object_rel_direction_easy",
            "object_rel_direction_medium",
            "object_rel_direction_hard",
            "object_rel_distance",
            "route_planning",
            "obj_appearance_order",
        ),
        "multiple-choice",
    ),
}
"""FlagEvalMM's names (pointing tasks, EmbodiedVerse, VSI-Bench) -> kinds."""


class Coordinates(str, Enum):
    GRID = "0-1000"
    PIXELS = "pixels"
    FRACTIONS = "fractions"
    SHOWN = "shown-pixels"
    FLAGEVALMM = "flagevalmm"

    __str__ = str.__str__


def kind_of(question: Question) -> str:
    """The kind of a question; FlagEvalMM's names are taken too."""
    name = str(question.get("question_type", ""))
    return ALIASES.get(name, name)


def coordinates_of_answers(question: Question) -> Coordinates:
    """As asked for by `coordinates`, else the unit of the truth."""
    return Coordinates(question.get("coordinates") or question.get("frame") or Coordinates.GRID)


def picture_size(question: Question) -> ImageSize:
    """The picture whose pixels are meant.

    Raises:
        ValueError: the question does not say.
    """
    given = question.get("size") or [question.get("image_width"), question.get("image_height")]
    if len(given) != 2 or not all(isinstance(side, int) and side > 0 for side in given):
        raise ValueError(
            f"question {question['question_id']} has coordinates in pixels and does not say of which picture; give "
            f"size: [width, height], or image_width and image_height"
        )
    return ImageSize(*given)


def read_points(question: Question, text: str, parse: Parse) -> PointsAnswer:
    """An answer's points, (u, v) in 0-1000; depth stays in metres."""
    return _points(text, _size_of_answers(question), parse)


def read_box(question: Question, text: str) -> BoxAnswer:
    """An answer's box in 0-1000."""
    return _box(text, _size_of_answers(question))


def true_points(question: Question, parse: Parse) -> np.ndarray:
    """`[n, 2]` or `[n, 3]`, (u, v) in 0-1000.

    Raises:
        ValueError: the true answer cannot be read.
    """
    read = _points(str(question.get("answer", "")), _size(question, _frame(question)), parse)
    return _sure(question, read.points, read.reason)


def true_box(question: Question) -> np.ndarray:
    """`[4]` in 0-1000; raises as `true_points`."""
    read = _box(str(question.get("answer", "")), _size(question, _frame(question)))
    return _sure(question, read.box, read.reason)


def true_length(question: Question) -> float:
    """Metres; raises as `true_points`."""
    if "metres" in question:
        return float(question["metres"])
    read = parse_length(str(question.get("answer", "")), unit_of(question))
    return _sure(question, read.metres, read.reason or ("" if read.metres > 0 else "a length must be positive"))


def unit_of(question: Question) -> str:
    """Unit of length that the question asks for; empty = the answer has to say it."""
    return str(question.get("unit", ""))


def true_number(question: Question) -> float:
    """Raises as `true_points`, and for 0, to which nothing has a relative distance."""
    read = parse_number(str(question.get("answer", "")))
    return _sure(question, read.value, read.reason or ("" if read.value else "the true number is 0"))


def true_hop(question: Question) -> float:
    """In [-1, 1]; raises as `true_points`."""
    if "hop" in question:
        return float(question["hop"])
    read = parse_score(str(question.get("answer", "")))
    return _sure(question, read.hop, read.reason)


def true_choice(question: Question) -> str:
    """A letter; the text of an option is taken too. Raises as `true_points`."""
    return _sure(question, *choice_of(question, str(question.get("answer", "")))[:2])


def choice_of(question: Question, text: str) -> tuple[str, str, str]:
    """Letter, and the reason and kind of failure, of an answer to a multiple choice."""
    options = question.get("options") or []
    said = text.strip().rstrip(".").casefold()
    same = [letter for letter, option in zip(ascii_uppercase, options, strict=False) if str(option).casefold() == said]
    if len(same) == 1:
        return same[0], "", ""
    read = parse_choice(text, ascii_uppercase[: max(4, len(options))] if options else "ABCDEFGHI")
    return read.letter, read.reason, str(read.problem or "")


def mask_of(question: Question, root: Path) -> np.ndarray:
    """`[height, width]` in [0, 1]; greys count in part, as in FlagEvalMM.

    Raises:
        ValueError: the mask cannot be read.
    """
    try:
        with Image.open(root / str(question["mask_path"])) as image:
            grey = eight_bit(image)
            values = np.asarray(grey.convert("RGB"))[..., 0] if grey.mode not in ("1", "L") else np.asarray(grey)
    except (KeyError, OSError, DeepColours) as error:
        raise ValueError(f"question {question['question_id']} has no readable mask_path: {error}") from error
    return values.astype(np.float64) / (1.0 if values.dtype == bool else 255.0)


def _frame(question: Question) -> Coordinates:
    return Coordinates(question.get("frame") or Coordinates.GRID)


def _size_of_answers(question: Question) -> ImageSize | None:
    coordinates = coordinates_of_answers(question)
    if coordinates is Coordinates.SHOWN:
        return ImageSize(*question["shown_size"]) if "shown_size" in question else picture_size(question)
    return _size(question, coordinates)


def _size(question: Question, coordinates: Coordinates) -> ImageSize | None:
    if coordinates in (Coordinates.PIXELS, Coordinates.FLAGEVALMM):
        return picture_size(question)
    return FRACTIONS if coordinates is Coordinates.FRACTIONS else None


def _points(text: str, size: ImageSize | None, parse: Parse) -> PointsAnswer:
    read = parse(text, size)
    if size is None or not read.ok:
        return read
    uv = read.points[:, :2] * (GRID / size.extent)
    return PointsAnswer(np.concatenate([uv, read.points[:, 2:]], axis=1))


def _box(text: str, size: ImageSize | None) -> BoxAnswer:
    read = parse_box(text, size)
    if size is None or not read.ok:
        return read
    return BoxAnswer(read.box * np.tile(GRID / size.extent, 2))


def _sure(question: Question, value: Any, reason: str) -> Any:
    if reason:
        raise ValueError(f"question {question['question_id']}: its true answer cannot be read: {reason}")
    return value
