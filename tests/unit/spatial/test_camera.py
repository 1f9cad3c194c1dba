import numpy as np
import pytest

from megatron_rb.spatial.camera import Camera, resolution_problem
from megatron_rb.spatial.points import ImageSize

INTRINSICS = [[100.0, 0.0, 50.0], [0.0, 200.0, 40.0], [0.0, 0.0, 1.0]]
POSE = [[0.0, 0.0, 1.0, 1.0], [-1.0, 0.0, 0.0, 2.0], [0.0, -1.0, 0.0, 3.0], [0.0, 0.0, 0.0, 1.0]]
"""At (1, 2, 3), looking along world x; the picture's right is world -y, its down is world -z."""
CAMERA = Camera.from_matrices(INTRINSICS, POSE, ImageSize(100, 80))


def test_projection_by_hand():
    # 2 m ahead, 0.5 m to the right, 0.2 m down: u = 50 + 100 * 0.5 / 2, v = 40 + 200 * 0.2 / 2
    np.testing.assert_allclose(CAMERA.project(np.array([3.0, 1.5, 2.8])), [75.0, 60.0, 2.0])


def test_back_projection_inverts_projection():
    world = np.random.default_rng(0).uniform([2, 0, 2], [5, 4, 4], (20, 3))
    seen = CAMERA.back_project(CAMERA.project(world))
    np.testing.assert_allclose(CAMERA.camera_to_world_points(seen), world)
    np.testing.assert_allclose(seen, CAMERA.world_to_camera(world))


def test_back_projection_by_hand_uses_z_depth():
    # X = (75 - 50) * 2 / 100, Y = (60 - 40) * 2 / 200, Z = d
    np.testing.assert_allclose(CAMERA.back_project(np.array([75.0, 60.0, 2.0])), [0.5, 0.2, 2.0])


def test_four_by_four_intrinsics_mean_the_same():
    wide = np.eye(4)
    wide[:3, :3] = INTRINSICS
    assert (Camera.from_matrices(wide, POSE, CAMERA.size).intrinsics == CAMERA.intrinsics).all()


def test_resized_camera_scales_pixels_and_keeps_depth():
    point = np.array([3.0, 1.5, 2.8])
    np.testing.assert_allclose(CAMERA.resized(ImageSize(200, 40)).project(point), [150.0, 30.0, 2.0])


def test_cropped_camera_moves_pixels():
    window = CAMERA.cropped(10, 20, ImageSize(90, 60))
    np.testing.assert_allclose(window.project(np.array([3.0, 1.5, 2.8])), [65.0, 40.0, 2.0])
    with pytest.raises(ValueError, match="leaves the 100 x 80 image"):
        CAMERA.cropped(11, 0, ImageSize(90, 60))


def test_point_behind_the_camera_has_no_pixel():
    with pytest.raises(ValueError, match="behind the camera"):
        CAMERA.project(np.array([0.0, 2.0, 3.0]))


@pytest.mark.parametrize(
    ("intrinsics", "message"),
    [
        (np.eye(2), "3 x 3 or 4 x 4"),
        (np.zeros((3, 3)), "positive"),
        (np.full((3, 3), np.nan), "not finite"),
        (np.diag([9.0, 9, 0]), "must be 0, 0, 1"),
    ],
)
def test_unusable_intrinsics_are_refused(intrinsics, message):
    with pytest.raises(ValueError, match=message):
        Camera.from_matrices(intrinsics, POSE, CAMERA.size)


@pytest.mark.parametrize(
    ("pose", "message"),
    [
        (np.eye(3), "4 x 4"),
        (np.diag([2.0, 2, 2, 1]), "must be a rotation"),
        (np.diag([-1.0, 1, 1, 1]), "mirrors"),
        (np.full((4, 4), np.inf), "not finite"),
    ],
)
def test_unusable_poses_are_refused(pose, message):
    with pytest.raises(ValueError, match=message):
        Camera.from_matrices(INTRINSICS, pose, CAMERA.size)


def test_intrinsics_of_another_resolution_are_known_by_their_principal_point():
    matrix = CAMERA.intrinsics  # (50, 40) is the middle of 100 x 80
    assert resolution_problem(matrix, CAMERA.size) == ""
    for size in (ImageSize(200, 160), ImageSize(50, 40), ImageSize(100, 40)):
        assert "another resolution" in resolution_problem(matrix, size)
