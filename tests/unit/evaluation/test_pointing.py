import math

import numpy as np
import pytest

from megatron_rb.evaluation.pointing import constant_token_loss, point_in_mask

MASK = np.zeros((10, 20), dtype=bool)
MASK[5:, 10:] = True
"""The lower right quarter."""


def test_points_are_scored_against_the_pixel_below_them():
    assert point_in_mask(np.array([[500, 500]]), MASK) == 1.0
    assert point_in_mask(np.array([[499, 500]]), MASK) == 0.0
    assert point_in_mask(np.array([[1000, 1000]]), MASK) == 1.0
    assert point_in_mask(np.array([[900, 900], [0, 0]]), MASK) == 0.5


def test_constant_token_loss_by_hand():
    # position 0: counts 0: 1+1, 1: 2+1, 2: 1 of 6; position 1: one answer, token 2: 2 of 4
    loss = constant_token_loss([[0, 2], [1], [1]], [[1, 2], [2]], vocab_size=3)
    assert loss == pytest.approx(-(math.log(3 / 6) + math.log(2 / 4) + math.log(1 / 6)) / 3)


def test_position_beyond_every_training_answer_is_uniform():
    assert constant_token_loss([[0]], [[0, 1]], vocab_size=4) == pytest.approx(-(math.log(2 / 5) + math.log(1 / 4)) / 2)


def test_empty_held_out_answers_are_refused():
    with pytest.raises(ValueError, match="no token"):
        constant_token_loss([[0]], [], vocab_size=4)
