import math

import numpy as np
import pytest

from megatron_rb.scores.pointing import box_in_mask, constant_token_loss, flagevalmm_in_mask, point_in_mask

MASK = np.zeros((10, 20), dtype=bool)
MASK[5:, 10:] = True
"""The lower right quarter."""


def test_points_are_scored_against_the_pixel_below_them():
    assert point_in_mask(np.array([[500, 500]]), MASK) == 1.0
    assert point_in_mask(np.array([[499, 500]]), MASK) == 0.0
    assert point_in_mask(np.array([[1000, 1000]]), MASK) == 1.0
    assert point_in_mask(np.array([[900, 900], [0, 0]]), MASK) == 0.5


def test_a_point_outside_the_image_is_a_miss_and_greys_count_in_part():
    assert point_in_mask(np.array([[900, 900], [1100, 900], [-1, 5], [900, 1e9]]), MASK) == 0.25
    assert point_in_mask(np.zeros((0, 2)), MASK) == 0.0
    assert point_in_mask(np.array([[900, 900], [0, 0]]), np.where(MASK, 0.8, 0.0)) == pytest.approx(0.4)


def test_a_box_stands_for_its_pixels():
    # 500-1000 by 0-1000 is the right half, 10 x 10 pixels, of which 5 rows are on the mask
    assert box_in_mask(np.array([500, 0, 1000, 1000]), MASK) == 0.5
    assert box_in_mask(np.array([500, 500, 510, 510]), MASK) == 0.0  # not one whole pixel


@pytest.mark.parametrize(
    ("text", "share", "named"),
    [
        ("(15, 7)", 1.0, 1),  # whole numbers are pixels
        ("(0.75, 0.75)", 1.0, 1),  # numbers with a point are fractions: int(.75 * 20), int(.75 * 10)
        ("(0.75, 1)", 0.0, 1),  # one of them is enough: y = 10, below the picture
        ("(19, 9), (20, 9)", 0.5, 2),  # the second lies outside
        ("(10, 0, 20, 10)", 0.5, 100),  # a box is all its pixels
        ("(0.5, 0.0, 1.0, 1.0)", 0.5, 100),
        ("(10, 0, 99, 99), (0, 0)", 50 / 101, 101),  # cut to the picture
        ("(15, 7)\nThat is all.", 0.0, 0),  # only the last line counts
        ("[15, 7]", 0.0, 0),
        ("(1, 2, 3)", 0.0, 0),
        ("(" + "1" * 99_000, 0.0, 0),
        ("(1" + ", 1" * 30_000, 0.0, 0),
        ("(" + "9" * 400 + ", 5)", 0.0, 1),
        ("(0, 0, 20, 10)" * 90_000, 0.25, 200 * 1000),
    ],
)
def test_flagevalmm_reads_pixels_or_fractions_of_the_last_line(text, share, named):
    assert flagevalmm_in_mask(text, MASK) == (pytest.approx(share), named)


def test_constant_token_loss_by_hand():
    # position 0: counts 0: 1+1, 1: 2+1, 2: 1 of 6; position 1: one answer, token 2: 2 of 4
    loss = constant_token_loss([[0, 2], [1], [1]], [[1, 2], [2]], vocab_size=3)
    assert loss == pytest.approx(-(math.log(3 / 6) + math.log(2 / 4) + math.log(1 / 6)) / 3)


def test_position_beyond_every_training_answer_is_uniform():
    assert constant_token_loss([[0]], [[0, 1]], vocab_size=4) == pytest.approx(-(math.log(2 / 5) + math.log(1 / 4)) / 2)


def test_empty_held_out_answers_are_refused():
    with pytest.raises(ValueError, match="no token"):
        constant_token_loss([[0]], [], vocab_size=4)
