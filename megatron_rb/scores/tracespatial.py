"""TraceSpatial-Bench's own files: `trajectory_dataset.json` with the questions, `raw_data/` with the pictures.

Fields of a question: id, image_path, gt_depth_path (16-bit PNG, millimetres), mask_path, gt_depth_intrinsics (3 x 3 or
4 x 4), prompt, target_object, destination|direction, trajectory (camera XYZ, metres), bbox_center, bbox_extent (full
lengths) and bbox_rotation of the destination.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_rb.scores.trace3d import OrientedBox, TraceScene, build_scene, last_points, score_trace
from megatron_rb.scores.trace_metrics import EVEN_POINTS, discrete_frechet, hausdorff, rmse_resampled
from megatron_rb.spatial.camera import resolution_problem
from megatron_rb.spatial.points import GRID, ImageSize
from megatron_rb.spatial.prompts import OBJECT_TRACE, format_points_with_depth
from megatron_rb.spatial.traces import resample

QUESTIONS, MEDIA = "trajectory_dataset.json", "raw_data"
KIND = "trace_spatial"
NEEDED = (
    "id",
    "image_path",
    "gt_depth_path",
    "mask_path",
    "gt_depth_intrinsics",
    "prompt",
    "trajectory",
    "bbox_center",
    "bbox_extent",
    "bbox_rotation",
)
MILLIMETRES = 1000.0
LARGEST_FRECHET = 100.0
"""Metres; a trace that is further away is left out of the mean distances, as in the released evaluation."""


def is_trace_spatial(folder: Path) -> bool:
    """Whether the folder is a copy of the benchmark."""
    return (folder / QUESTIONS).is_file()


def read_questions(folder: Path) -> list[dict[str, Any]]:
    """The questions in the form of FlagEvalMM's data.json, with the benchmark's own fields kept.

    Raises:
        ValueError: a question lacks a field.
    """
    try:
        rows = json.loads((folder / QUESTIONS).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / QUESTIONS} is not JSON: {error}") from error
    if not rows:
        raise ValueError(f"{folder / QUESTIONS} holds no question")
    return [_question(row, folder) for row in rows]


def _question(row: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    missing = [name for name in NEEDED if row.get(name) is None]
    if missing:
        raise ValueError(f"question {row.get('id')} of {folder / QUESTIONS} lacks {', '.join(missing)}")
    with Image.open(folder / MEDIA / row["gt_depth_path"]) as picture:
        size = np.array(picture.size)
    problem = resolution_problem(_intrinsics(row), ImageSize(*map(int, size)))
    if problem:
        raise ValueError(f"question {row['id']} of {folder / QUESTIONS}: in {row['gt_depth_path']}, {problem}")
    truth = np.asarray(row["trajectory"], dtype=np.float64)
    if truth.ndim != 2 or truth.shape[1] != 3 or not len(truth) or not (truth[:, 2] > 0).all():
        raise ValueError(
            f"question {row['id']} of {folder / QUESTIONS} has a trajectory of shape {truth.shape}; give camera XYZ in "
            f"front of the camera"
        )
    pixels = project(truth, _intrinsics(row))
    answer = np.column_stack([np.rint(pixels / size * GRID), truth[:, 2]])
    made = {
        "question_id": str(row["id"]),
        "img_path": f"{MEDIA}/{row['image_path']}",
        "question_type": KIND,
        "question": OBJECT_TRACE.format(instruction=row["prompt"]),
        "answer": format_points_with_depth(answer),
    }
    return {**row, **made}


def load_scene(question: Mapping[str, Any], folder: Path) -> tuple[TraceScene, np.ndarray, tuple[int, int]]:
    """The scene, the object's mask in pixels of the depth picture, and that picture's (width, height)."""
    media = folder / MEDIA
    with Image.open(media / str(question["gt_depth_path"])) as picture:
        depth = np.asarray(picture).astype(np.float64) / MILLIMETRES
    with Image.open(media / str(question["mask_path"])) as picture:
        same = (
            picture
            if picture.size == depth.shape[::-1]
            else picture.resize(depth.shape[::-1], Image.Resampling.NEAREST)
        )
        pixels = np.asarray(same)
    mask = (pixels[..., 0] if pixels.ndim == 3 else pixels) > 0
    center, extent = (np.asarray(question[name], dtype=np.float64) for name in ("bbox_center", "bbox_extent"))
    box = OrientedBox(center, extent, np.asarray(question["bbox_rotation"], dtype=np.float64).reshape(3, 3))
    start = np.asarray(question["trajectory"], dtype=np.float64)[0]
    scene = build_scene(depth, mask, _intrinsics(question), start, box)
    return scene, mask, (depth.shape[1], depth.shape[0])


def check(question: Mapping[str, Any], folder: Path) -> None:
    """Whether the question's pictures are there.

    Raises:
        ValueError: one cannot be read.
    """
    for name in ("gt_depth_path", "mask_path"):
        try:
            with Image.open(folder / MEDIA / str(question[name])) as picture:
                picture.verify()
        except (OSError, SyntaxError) as error:
            raise ValueError(f"question {question['question_id']} has no readable {name}: {error}") from error


def score_answer(question: Mapping[str, Any], points: np.ndarray, folder: Path) -> tuple[bool, dict[str, float]]:
    """Success, and the benchmark's further figures, of an answer that could be read.

    Distances of the two traces are in metres, after both are resampled to 100 points by arc length.

    Args:
        points: `[n, 3]`, (u, v) in 0-1000 and z-depth in metres.
    """
    scene, mask, size = load_scene(question, folder)
    intrinsics = _intrinsics(question)
    pixels = points[:, :2] / GRID * np.array(size)
    trace = back_project(np.column_stack([pixels, points[:, 2]]), intrinsics)
    truth = np.asarray(question["trajectory"], dtype=np.float64)
    score = score_trace(trace, scene)
    corners = project(scene.destination.corners(), intrinsics)
    ends = last_points(pixels)
    end_2d = ((ends >= corners.min(axis=0)) & (ends <= corners.max(axis=0))).all(axis=1).any()
    even, true = resample(trace, EVEN_POINTS), resample(truth, EVEN_POINTS)
    measures = {
        "start": float(bool(score.start)),
        "end": float(bool(score.end)),
        "no_collision": float(not score.collision),
        "start_in_mask_2d": float(_on_mask(pixels[0], mask)),
        "end_in_box_2d": float(end_2d),
    }
    frechet = discrete_frechet(even, true)
    if frechet <= LARGEST_FRECHET:
        further = {"hd_metres": hausdorff(even, true), "rmse_metres": rmse_resampled(trace, truth)}
        measures |= {"dfd_metres": frechet, **further}
    return score.success, measures


def project(points: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """Camera XYZ `[n, 3]` -> pixels `[n, 2]`; nothing is cut off, since a box may reach behind the camera."""
    z = np.where(np.abs(points[:, 2]) < 1e-6, 1e-6, points[:, 2])
    return points[:, :2] / z[:, None] * np.diag(intrinsics)[:2] + intrinsics[:2, 2]


def back_project(points: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """(u pixels, v pixels, z metres) `[n, 3]` -> camera XYZ `[n, 3]`."""
    z = points[:, 2:]
    return np.concatenate([(points[:, :2] - intrinsics[:2, 2]) * z / np.diag(intrinsics)[:2], z], axis=1)


def _intrinsics(question: Mapping[str, Any]) -> np.ndarray:
    matrix = np.asarray(question["gt_depth_intrinsics"], dtype=np.float64)
    if matrix.shape not in ((3, 3), (4, 4)):
        raise ValueError(
            f"question {question.get('question_id', question.get('id'))} has gt_depth_intrinsics of shape "
            f"{matrix.shape}; give a 3 x 3 or 4 x 4 matrix"
        )
    return matrix[:3, :3]


def _on_mask(pixel: np.ndarray, mask: np.ndarray) -> bool:
    column, row = (round(float(value)) for value in pixel)
    return bool(0 <= row < mask.shape[0] and 0 <= column < mask.shape[1] and mask[row, column])
