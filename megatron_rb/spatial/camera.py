"""A pinhole camera: world points -> (pixel, z-depth) and back; x right, y down, z forward, metres."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_rb.spatial.points import ImageSize

ROTATION_TOLERANCE = 1e-3
"""Poses in files are rounded."""
CENTRAL = (0.3, 0.7)
"""Share of an image's width and height within which the principal point of a whole picture lies."""


def resolution_problem(intrinsics: np.ndarray, size: ImageSize) -> str:
    """Why intrinsics cannot hold for a whole picture of this size; empty = they may.

    Intrinsics of a picture twice as large put the principal point into a corner of this one.
    """
    place = intrinsics[:2, 2] / size.extent
    if ((place > CENTRAL[0]) & (place < CENTRAL[1])).all():
        return ""
    u, v = intrinsics[:2, 2]
    return (
        f"the principal point ({u:g}, {v:g}) is far from the middle of the {size} picture, so the intrinsics seem to "
        f"hold for another resolution"
    )


@dataclass(frozen=True)
class Camera:
    """Intrinsics hold for `size` only; use `resized` when the image has another resolution."""

    intrinsics: np.ndarray
    """3 x 3, pixels."""
    camera_to_world: np.ndarray
    """4 x 4, metres."""
    size: ImageSize

    @classmethod
    def from_matrices(cls, intrinsics: object, camera_to_world: object, size: ImageSize) -> Camera:
        """Accepts 3 x 3 or 4 x 4 intrinsics as nested lists or arrays.

        Raises:
            ValueError: a shape, a number that is not finite, a focal length that is not positive, or a pose that does
                more than turn and move.
        """
        matrix = np.asarray(intrinsics, dtype=np.float64)
        pose = np.asarray(camera_to_world, dtype=np.float64)
        if matrix.shape not in ((3, 3), (4, 4)):
            raise ValueError(f"intrinsics have shape {matrix.shape}; give a 3 x 3 or 4 x 4 matrix")
        if pose.shape != (4, 4):
            raise ValueError(f"camera_to_world has shape {pose.shape}; give a 4 x 4 matrix")
        matrix = matrix[:3, :3]
        if not (np.isfinite(matrix).all() and np.isfinite(pose).all()):
            raise ValueError(f"intrinsics {matrix.tolist()} or pose {pose.tolist()} hold values that are not finite")
        if matrix[0, 0] <= 0 or matrix[1, 1] <= 0:
            raise ValueError(f"focal lengths {matrix[0, 0]:g} and {matrix[1, 1]:g} must be positive pixels")
        if not np.allclose(matrix[2], (0, 0, 1)):
            raise ValueError(f"the last row of the intrinsics is {matrix[2].tolist()}; it must be 0, 0, 1")
        turn = pose[:3, :3]
        if np.abs(turn @ turn.T - np.eye(3)).max() > ROTATION_TOLERANCE or np.linalg.det(turn) < 0:
            raise ValueError(
                f"camera_to_world {pose.tolist()} scales or mirrors; its upper left 3 x 3 must be a rotation"
            )
        return cls(matrix, pose, size)

    def resized(self, size: ImageSize) -> Camera:
        """The same camera for the same picture at another resolution."""
        scale = np.append(size.extent / self.size.extent, 1.0)
        return Camera(self.intrinsics * scale[:, None], self.camera_to_world, size)

    def cropped(self, left: int, top: int, size: ImageSize) -> Camera:
        """The camera of a window of the picture: the principal point moves, the focal length stays."""
        if left < 0 or top < 0 or left + size.width > self.size.width or top + size.height > self.size.height:
            raise ValueError(
                f"window {size.width} x {size.height} at ({left}, {top}) leaves the {self.size.width} x "
                f"{self.size.height} image; move or shrink it"
            )
        shift = np.zeros((3, 3))
        shift[:2, 2] = (left, top)
        return Camera(self.intrinsics - shift, self.camera_to_world, size)

    def world_to_camera(self, points: np.ndarray) -> np.ndarray:
        """[..., 3] world -> [..., 3] camera."""
        rotation, origin = self.camera_to_world[:3, :3], self.camera_to_world[:3, 3]
        return (np.asarray(points, dtype=np.float64) - origin) @ rotation

    def camera_to_world_points(self, points: np.ndarray) -> np.ndarray:
        rotation, origin = self.camera_to_world[:3, :3], self.camera_to_world[:3, 3]
        return np.asarray(points, dtype=np.float64) @ rotation.T + origin

    def project(self, points: np.ndarray) -> np.ndarray:
        """[..., 3] world -> [..., 3] (u pixels, v pixels, z-depth metres); a point behind the camera is an error."""
        return self.project_seen(self.world_to_camera(points))

    def project_seen(self, points: np.ndarray) -> np.ndarray:
        """`project` for points [..., 3] in the camera's frame; the inverse of `back_project`."""
        seen = np.asarray(points, dtype=np.float64)
        depth = seen[..., 2:]
        if (depth <= 0).any():
            raise ValueError(f"points at z-depth {depth.ravel().tolist()} m lie behind the camera and have no pixel")
        return np.concatenate([(seen / depth @ self.intrinsics.T)[..., :2], depth], axis=-1)

    def back_project(self, points: np.ndarray) -> np.ndarray:
        """[..., 3] (u pixels, v pixels, z-depth metres) -> [..., 3] in the camera's frame."""
        points = np.asarray(points, dtype=np.float64)
        depth = points[..., 2:]
        if (depth <= 0).any():
            raise ValueError(f"z-depths {depth.ravel().tolist()} m must be positive")
        rays = np.concatenate([points[..., :2], np.ones_like(depth)], axis=-1) @ np.linalg.inv(self.intrinsics).T
        return rays * depth
