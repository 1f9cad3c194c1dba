"""Drawn micro-batches: packed as in training, padded as in training, repeatable."""

import numpy as np
import pytest

from megatron_rb.planner.histogram import Histogram
from megatron_rb.planner.workload import Drawn, MicroBatches, MicroBatchLimits, MicroBatchSampler
from tests.unit.planner.cases import mixed_histogram, packed


def test_budgets_are_kept_and_nothing_of_a_step_is_lost():
    sampler = MicroBatchSampler(mixed_histogram(), 4, 64, packed)
    drawn = sampler.draw(MicroBatchLimits(4096, 8192), 4, 1)
    assert drawn.batches.tokens.max() <= 4096 and drawn.batches.patches.max() <= 8192
    steps = drawn.batches.samples.reshape(-1, drawn.ranks, drawn.batches.samples.shape[1]).sum(axis=(1, 2))
    assert (steps == 64).all()
    again = MicroBatchSampler(mixed_histogram(), 4, 64, packed).draw(MicroBatchLimits(4096, 8192), 4, 1)
    np.testing.assert_array_equal(drawn.batches.tokens, again.batches.tokens)


def test_micro_batches_of_a_rank_are_a_multiple_where_chunks_interleave():
    assert (
        MicroBatchSampler(mixed_histogram(), 4, 64, packed).draw(MicroBatchLimits(4096, 8192), 2, 4).num_micro_batches
        % 4
        == 0
    )


def test_a_long_step_is_drawn_in_part_and_counted_whole():
    drawn = MicroBatchSampler(mixed_histogram(), 4, 6400, packed).draw(MicroBatchLimits(4096, 16384), 1, 1)
    assert drawn.batches.tokens.shape[1] < 80
    whole = 6400 * float(mixed_histogram().tokens(4) @ mixed_histogram().counts) / mixed_histogram().num_samples / 4096
    assert drawn.num_micro_batches == pytest.approx(whole, rel=0.25)


def test_mean_step_is_the_mean_of_the_histogram():
    histogram = Histogram(np.array([10, 30]), np.array([0, 400]), np.array([0.0, 100.0]), np.array([3, 1]))
    step = MicroBatchSampler(histogram, 4, 8, packed).mean_step(2)
    assert float(step.tokens[0]) == 3 * 10 + 130
    assert float(step.pairs[0]) == 3 * 100 + 130**2
    assert float(step.frame_pairs[0]) == 400 * 100


def test_every_rank_pads_to_the_largest_of_its_turn_and_padding_attends_to_itself():
    values = {
        "tokens": [[100.0], [310.0]],
        "pairs": [[100.0**2], [310.0**2]],
        "patches": [[0.0], [64.0]],
        "frame_pairs": [[0.0], [64.0**2]],
        "labels": [[50.0], [50.0]],
        "samples": [[1.0], [1.0]],
    }
    drawn = Drawn(MicroBatches(**{name: np.array(rows) for name, rows in values.items()}), 1, ranks=2)
    padded = drawn.padded(MicroBatchLimits(800, 640), 8)
    assert padded.tokens.tolist() == [[400.0], [400.0]]
    assert padded.patches.tolist() == [[80.0], [80.0]]
    assert padded.pairs.tolist() == [[100.0**2 + 300.0**2], [310.0**2 + 90.0**2]]
    assert drawn.padded(MicroBatchLimits(800, 640), 0) is drawn.batches
