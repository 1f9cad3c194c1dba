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
POINTING_FORMAT_20 = (
    "Your answer should be formatted as a list of tuples, i.e. [(x1, y1), (x2, y2), ...], where each tuple contains "
    "the x and y coordinates of a point satisfying the conditions above. The coordinates should indicate the "
    "normalized pixel locations of the points in the image."
)
"""RoboBrain 2.0's own words; the numbers it was trained on are absolute pixels all the same."""
ROBOT = 'You are a robot using the joint control. The task is "{instruction}".'
AFFORDANCE = ROBOT + " Please predict a possible affordance area of the end effector."
TRAJECTORY_20 = ROBOT + (
    " Please predict up to 10 key trajectory points to complete the task. Your answer should be formatted as a list of "
    "tuples, i.e. [[x1, y1], [x2, y2], ...], where each tuple contains the x and y coordinates of a point."
)
GROUNDING = "Please provide the bounding box coordinate of the region this sentence describes: {target}."
TRACE_2D = (
    "Please predict 2D end-effector-centric waypoints to complete the task successfully. "
    'The task is "{instruction}". '
    "Your answer should be formatted as a list of tuples, i.e., [(x1, y1), (x2, y2), ...], "
    "where each tuple contains the x and y coordinates of the point."
)
OBJECT_TRACE = (
    'Point the 3D object-centric visual trace for the task "{instruction}". Your answer should be formatted as a list '
    "of tuples, i.e., [(x1, y1, d1), (x2, y2, d2), ...], where each tuple contains the x and y coordinates of the "
    "point, and d is the depth of the point."
)
"""As the authors of TraceSpatial-Bench ask their own model."""
LIFTING = (
    'The 2D waypoints of the end effector for the task "{instruction}" are {trace}. Please give each its depth. '
    "Your answer should be formatted as a list of tuples, i.e., [(x1, y1, d1), (x2, y2, d2), ...], "
    "where each tuple contains the x and y coordinates and the depth of the point."
)
MEASURING = (
    "How far is the {a} from the {b}? Answer in {unit}.",
    "What is the distance between the {a} and the {b} in {unit}?",
)
MULTI_VIEW = (
    "Both pictures show the same scene at the same time. The {target} is at ({u}, {v}) in the first. "
    "Where is it in the second? Your answer should be formatted as a tuple, i.e. [(x, y)]."
)
NEXT_STEP = ROBOT + " The picture shows the scene now. What is the next step?"
REMAINING = ROBOT + " The picture shows the scene now. Which steps are left, in order?"
TEMPORAL_ORDER = (
    'The pictures show moments of the task "{instruction}" in mixed order. In which order did they happen? '
    "Answer with the numbers of the pictures, first moment first, e.g. [2, 1, 3]."
)
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


def pointing(target: str, rng: np.random.Generator, form: str = POINTING_FORMAT) -> str:
    return f"{IMAGE}\n{choose(POINTING, rng).format(target=target)} {form}"


def locating(target: str, rng: np.random.Generator) -> str:
    return f"{IMAGE}\n{choose(LOCATING, rng).format(target=target)} {LOCATING_FORMAT}"


def waypoints(instruction: str) -> str:
    return f"{IMAGE}\n{WAYPOINTS.format(instruction=instruction)}"


def hop(instruction: str, slots: Sequence[str]) -> str:
    """`slots` name the pictures in order, e.g. `BEFORE side`."""
    return HOP.format(instruction=instruction, slots="\n".join(f"{slot}: {IMAGE}" for slot in slots))


def images(count: int) -> str:
    """Numbered pictures, one a line."""
    return "\n".join(f"Picture {number}: {IMAGE}" for number in range(1, count + 1))


def format_box(corners: np.ndarray) -> str:
    """[2, 2] corners -> `[x1, y1, x2, y2]`."""
    return str([int(value) for value in np.asarray(corners).ravel()])


def format_length(metres: float, unit: str) -> str:
    """`0.104 m`, `10.4 cm`, `4.1 inch`."""
    if unit == "m":
        return f"{metres:.3f} m"
    return f"{metres * 100:.1f} cm" if unit == "cm" else f"{metres / 0.0254:.1f} inch"


def format_points(points: np.ndarray) -> str:
    """[n, 2] integers 0-1000 -> `[(x, y), ...]`."""
    return "[" + ", ".join(f"({int(x)}, {int(y)})" for x, y in points) + "]"


def format_points_with_depth(points: np.ndarray) -> str:
    """[n, 3] (0-1000, 0-1000, metres) -> `[(x, y, d), ...]`, d with three decimals."""
    return "[" + ", ".join(f"({int(x)}, {int(y)}, {d:.3f})" for x, y, d in points) + "]"
