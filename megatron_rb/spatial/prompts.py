"""Questions of the three spatial tasks; wordings vary, the answer formats do not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

IMAGE = "<image>"

POINTING = (
    "Point to the {target}.",
    "Where is the {target}?",
    "Locate the {target} in the image.",
)
POINTING_FORMAT = "Please provide its 2D coordinates. Your answer should be formatted as a tuple, i.e. [(x, y)]."
LOCATING = (
    "Point to the {target} and tell how far it is from the camera.",
    "Where is the {target}, with its depth?",
    "Locate the {target} in space.",
)
LOCATING_FORMAT = (
    "Please provide its 3D coordinates, d being the depth. "
    "Your answer should be formatted as a tuple, i.e. [(x, y, d)]."
)
WAYPOINTS = (
    "Please predict 3D end-effector-centric waypoints to complete the task successfully. "
    'The task is "{instruction}". '
    "Your answer should be formatted as a list of tuples, i.e., [(x1, y1, d1), (x2, y2, d2), ...], "
    "where each tuple contains the x and y coordinates and the depth of the point."
)
HOP = (
    "You judge how far a robot has come with a task, strictly by what the pictures show.\n"
    "<Task>{instruction}</Task>\n"
    "{slots}\n"
    "How much closer is AFTER to the goal than BEFORE? Progress counts relative to what was left to do, "
    "a setback relative to what had been done. Ignore light and background; when in doubt answer zero. "
    "Answer with <score>+NN%</score>, <score>-NN%</score> or <score>0%</score>."
)


def choose(templates: Sequence[str], rng: np.random.Generator) -> str:
    return templates[int(rng.integers(len(templates)))]


def pointing(target: str, rng: np.random.Generator) -> str:
    return f"{IMAGE}\n{choose(POINTING, rng).format(target=target)} {POINTING_FORMAT}"


def locating(target: str, rng: np.random.Generator) -> str:
    return f"{IMAGE}\n{choose(LOCATING, rng).format(target=target)} {LOCATING_FORMAT}"


def waypoints(instruction: str) -> str:
    return f"{IMAGE}\n{WAYPOINTS.format(instruction=instruction)}"


def hop(instruction: str, slots: Sequence[str]) -> str:
    """`slots` name the pictures in order, e.g. `BEFORE side`."""
    return HOP.format(instruction=instruction, slots="\n".join(f"{slot}: {IMAGE}" for slot in slots))


def format_points(points: np.ndarray) -> str:
    """[n, 2] integers 0-1000 -> `[(x, y), ...]`."""
    return "[" + ", ".join(f"({int(x)}, {int(y)})" for x, y in points) + "]"


def format_points_with_depth(points: np.ndarray) -> str:
    """[n, 3] (0-1000, 0-1000, metres) -> `[(x, y, d), ...]`, d with three decimals."""
    return "[" + ", ".join(f"({int(x)}, {int(y)}, {d:.3f})" for x, y, d in points) + "]"
