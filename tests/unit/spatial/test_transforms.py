import numpy as np
import pytest
from PIL import Image

from megatron_rb.spatial.camera import Camera
from megatron_rb.spatial.points import ImageSize, pixel_index
from megatron_rb.spatial.transforms import Crop, HorizontalFlip, ImageTransform, Resize
from megatron_rb.spatial.values import Points, Unit

SIZE = ImageSize(60, 40)
TRANSFORMS = [
    Resize(SIZE, ImageSize(180, 80)),
    Resize(SIZE, ImageSize(30, 20)),
    Crop(SIZE, 7, 5, ImageSize(40, 30)),
    HorizontalFlip(SIZE),
]
CAMERA = Camera.from_matrices([[50, 0, 31], [0, 55, 19], [0, 0, 1]], np.eye(4), SIZE)


def ids(transform):
    return type(transform).__name__


@pytest.mark.parametrize("transform", TRANSFORMS, ids=ids)
def test_a_marked_block_and_its_point_stay_together(transform):
    """Paint 4 x 4 pixels, transform the picture, and look whether the moved point lands on the paint."""
    random = np.random.default_rng(0)
    for _ in range(20):
        left, top = random.integers([8, 6], [40, 30]) // 2 * 2
        array = np.zeros((SIZE.height, SIZE.width), dtype=np.uint8)
        array[top : top + 4, left : left + 4] = 255
        centre = Points(np.array([[left + 2.0, top + 2.0, 1.5]]), Unit.PIXELS, SIZE)
        moved = transform.points(centre)
        where = pixel_index(moved.values[0, :2], transform.result)
        assert np.asarray(transform.image(Image.fromarray(array)))[where] > 128
        assert transform.labels(array)[where] == 255
        assert moved.values[0, 2] == 1.5 and moved.size == transform.result


@pytest.mark.parametrize("transform", TRANSFORMS, ids=ids)
def test_moved_points_lead_to_the_same_place_in_space(transform):
    points = Points(np.array([[20.0, 15.0, 0.8], [30.0, 20.0, 2.0]]), Unit.PIXELS, SIZE)
    np.testing.assert_allclose(transform.points(points).in_world(transform.camera(CAMERA)), points.in_world(CAMERA))


@pytest.mark.parametrize("transform", TRANSFORMS, ids=ids)
@pytest.mark.parametrize("unit", list(Unit))
def test_points_keep_their_unit(transform, unit):
    pixels = Points(np.array([[20.0, 15.0]]), Unit.PIXELS, SIZE)
    given = {Unit.PIXELS: pixels, Unit.GRID: pixels.on_grid(), Unit.NORMALISED: pixels.normalised()}[unit]
    moved = transform.points(given)
    assert moved.unit is unit
    np.testing.assert_allclose(moved.in_pixels(transform.result).values, transform.points(pixels).values)


def test_points_by_hand():
    point = Points(np.array([[15.0, 10.0]]), Unit.PIXELS, SIZE)
    moved = [transform.points(point).values[0].tolist() for transform in TRANSFORMS]
    assert moved == [[45.0, 20.0], [7.5, 5.0], [8.0, 5.0], [45.0, 10.0]]
    assert not Crop(SIZE, 20, 5, ImageSize(40, 30)).points(point).inside()[0]


def test_a_transform_without_its_points_cannot_be_made():
    class OnlyPixels(ImageTransform):
        def image(self, image):
            return image

    with pytest.raises(TypeError, match="abstract"):
        OnlyPixels()


@pytest.mark.parametrize("transform", TRANSFORMS, ids=ids)
def test_images_and_points_of_another_size_are_refused(transform):
    with pytest.raises(ValueError, match="60 x 40"):
        transform.image(Image.new("L", (10, 10)))
    with pytest.raises(ValueError, match="60 x 40"):
        transform.points(Points(np.zeros((1, 2)), Unit.PIXELS, ImageSize(10, 10)))
