import numpy as np
import pytest

from megatron_rb.spatial.camera import Camera
from megatron_rb.spatial.points import ImageSize
from megatron_rb.spatial.values import Box, Points, Unit

SIZE = ImageSize(200, 100)
CAMERA = Camera.from_matrices([[100, 0, 100], [0, 100, 50], [0, 0, 1]], np.eye(4), SIZE)


def test_one_point_in_three_units():
    points = Points(np.array([[250, 500, 1.5]]), Unit.GRID)
    assert points.in_pixels(SIZE).values.tolist() == [[50.0, 50.0, 1.5]]
    assert points.normalised().values.tolist() == [[0.25, 0.5, 1.5]]
    assert points.in_pixels(SIZE).on_grid().values.tolist() == [[250.0, 500.0, 1.5]]
    assert points.in_pixels(ImageSize(400, 400)).values.tolist() == [[100.0, 200.0, 1.5]]
    assert points.without_depth().values.tolist() == [[250.0, 500.0]]


def test_grid_points_lead_to_camera_xyz_by_hand():
    # u = 50, v = 75: X = (50 - 100) * 2 / 100, Y = (75 - 50) * 2 / 100
    xyz = Points(np.array([[250, 750, 2.0]]), Unit.GRID).in_camera(CAMERA)
    np.testing.assert_allclose(xyz, [[-1.0, 0.5, 2.0]])
    np.testing.assert_allclose(Points.of_world(xyz, CAMERA).on_grid().values, [[250, 750, 2.0]])


def test_camera_and_world_differ_by_the_pose():
    pose = np.eye(4)
    pose[:3, 3] = (5, 6, 7)
    moved = Camera.from_matrices(CAMERA.intrinsics, pose, SIZE)
    points = Points.of_camera(np.array([[-1.0, 0.5, 2.0]]), moved)
    assert points.values.tolist() == [[50.0, 75.0, 2.0]]  # u = 100 - 100 / 2, v = 50 + 50 / 2
    np.testing.assert_allclose(points.in_camera(moved), [[-1.0, 0.5, 2.0]])
    np.testing.assert_allclose(points.in_world(moved), [[4.0, 6.5, 9.0]])
    np.testing.assert_allclose(Points.of_world(np.array([[4.0, 6.5, 9.0]]), moved).values, points.values)
    with pytest.raises(ValueError, match="behind the camera"):
        Points.of_camera(np.array([[0, 0, -0.1]]), moved)


def test_pixels_of_another_resolution_are_refused():
    points = Points(np.array([[10, 10, 1.0]]), Unit.PIXELS, ImageSize(400, 200))
    with pytest.raises(ValueError, match="400 x 200 image, the intrinsics hold for 200 x 100"):
        points.in_world(CAMERA)
    moved = points.in_pixels(SIZE).in_world(CAMERA)
    np.testing.assert_allclose(moved, points.in_world(CAMERA.resized(ImageSize(400, 200))))


def test_units_are_not_mixed():
    with pytest.raises(ValueError, match="in 0-1000, pixels is expected"):
        Points(np.zeros((1, 2)), Unit.GRID).require(Unit.PIXELS)
    with pytest.raises(ValueError, match="pixels need the size"):
        Points(np.zeros((1, 2)), Unit.PIXELS)
    with pytest.raises(ValueError, match="others have none"):
        Points(np.zeros((1, 2)), Unit.GRID, SIZE)


@pytest.mark.parametrize(
    ("values", "message"),
    [([[1, 2, 0]], "positive"), ([[1, 2, -1]], "positive"), ([[np.nan, 2]], "not finite"), ([1, 2], "shape")],
)
def test_impossible_points_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Points(np.array(values, dtype=float), Unit.GRID)


def test_points_without_depth_have_no_place_in_space():
    with pytest.raises(ValueError, match="without depth"):
        Points(np.zeros((1, 2)), Unit.GRID).in_camera(CAMERA)
    with pytest.raises(ValueError, match="behind the camera"):
        Points.of_world(np.array([[0, 0, -1.0]]), CAMERA)


def test_box_of_a_mask_covers_its_pixels():
    mask = np.zeros((100, 200), dtype=bool)
    mask[10:20, 30:50] = True
    assert Box.of_mask(mask).corners.values.tolist() == [[30, 10], [50, 20]]
    with pytest.raises(ValueError, match="empty"):
        Box.of_mask(np.zeros((4, 4), dtype=bool))
    with pytest.raises(ValueError, match="upper left"):
        Box(Points(np.array([[5, 5], [1, 9]]), Unit.GRID))
