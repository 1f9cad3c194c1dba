"""Tokens of a context-parallel rank, and the keys that they see."""

import numpy as np
import pytest

from megatron_rb.layout.token_axis import parts_in, ranges_of_rank, token_multiple


@pytest.mark.parametrize("cp_size", [1, 2, 3, 4])
def test_every_token_is_on_one_rank_and_causal_work_is_even(cp_size):
    tokens = 24 * cp_size
    rows = [np.concatenate([np.arange(*each) for each in ranges_of_rank(tokens, r, cp_size)]) for r in range(cp_size)]
    assert sorted(np.concatenate(rows).tolist()) == list(range(tokens))
    assert len({int((own + 1).sum()) for own in rows}) == 1
    assert all((np.diff(own) > 0).all() for own in rows)


def test_hand_computed_parts():
    # Two ranks, chunks of 4: rank 0 holds tokens 0-3 and 12-15, rank 1 holds 4-11. Samples end at 6, 7 and 16.
    borders = (0, 6, 7, 16)
    assert ranges_of_rank(16, 0, 2) == [(0, 4), (12, 16)] and ranges_of_rank(16, 1, 2) == [(4, 12)]
    first = parts_in(borders, ranges_of_rank(16, 0, 2))
    assert (first.lengths, first.key_lengths, first.key_ranges) == ((4, 4), (4, 9), ((0, 4), (7, 16)))
    second = parts_in(borders, ranges_of_rank(16, 1, 2))
    assert (second.lengths, second.key_lengths, second.key_ranges) == ((2, 1, 5), (6, 1, 5), ((0, 12),))


@pytest.mark.parametrize("seed", range(20))
def test_keys_are_those_of_the_same_sample_up_to_the_end_of_the_part(seed):
    """Against the mask of the whole axis, token by token; empty samples and samples over many chunks among them."""
    draw = np.random.default_rng(seed)
    cp_size = int(draw.integers(1, 5))
    tokens = 2 * cp_size * int(draw.integers(1, 7))
    borders = [0, *sorted(draw.integers(0, tokens + 1, size=draw.integers(0, 6)).tolist()), tokens]
    sample = np.searchsorted(borders, np.arange(tokens), side="right")
    for rank in range(cp_size):
        ranges = ranges_of_rank(tokens, rank, cp_size)
        parts = parts_in(borders, ranges)
        rows = np.concatenate([np.arange(*each) for each in ranges])
        keys = np.concatenate([np.arange(*each) for each in parts.key_ranges])
        assert sum(parts.lengths) == len(rows) and sum(parts.key_lengths) == len(keys)
        row = column = 0
        for length, seen in zip(parts.lengths, parts.key_lengths, strict=True):
            for place in range(length):
                token = rows[row + place]
                visible = keys[column : column + seen - length + place + 1]
                wanted = [other for other in range(token + 1) if sample[other] == sample[token]]
                assert visible.tolist() == wanted
            row, column = row + length, column + seen


def test_tokens_are_padded_for_both_cuts():
    assert [token_multiple(1, 1), token_multiple(1, 4), token_multiple(2, 1), token_multiple(2, 4)] == [1, 4, 4, 8]
    assert token_multiple(4, 3) == 24
