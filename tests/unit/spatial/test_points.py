import numpy as np
import pytest

from megatron_rb.spatial.points import ImageSize, grid_to_pixels, inside, pixel_index, pixels_to_grid

SIZE = ImageSize(200, 100)


def test_grid_is_relative_to_each_side():
    assert pixels_to_grid(np.array([50.0, 50.0]), SIZE).tolist() == [250, 500]
    assert grid_to_pixels(np.array([250, 500]), SIZE).tolist() == [50.0, 50.0]


def test_round_trip_stays_within_half_a_grid_step():
    pixels = np.random.default_rng(0).uniform(0, 1, (100, 2)) * SIZE.extent
    assert (np.abs(grid_to_pixels(pixels_to_grid(pixels, SIZE), SIZE) - pixels) <= SIZE.extent / 2000 + 1e-9).all()


@pytest.mark.parametrize("pixel", [(-1.0, 5.0), (201.0, 5.0), (5.0, 101.0), (float("nan"), 5.0)])
def test_point_outside_the_image_is_an_error(pixel):
    with pytest.raises(ValueError, match="outside"):
        pixels_to_grid(np.array(pixel), SIZE)


def test_inside_excludes_the_far_edge_and_pixel_index_takes_it_in():
    assert inside(np.array([[0.0, 0.0], [199.9, 99.9], [200.0, 50.0]]), SIZE).tolist() == [True, True, False]
    assert pixel_index(np.array([200.0, 100.0]), SIZE) == (99, 199)


def test_empty_image_size_is_refused():
    with pytest.raises(ValueError, match="0 x 100"):
        ImageSize(0, 100)
