"""Keys that context-parallel ranks exchange: the rows they are cut from, and the way back of the gradients."""

import pytest
import torch

from megatron_rb.layout.token_axis import parts_in, ranges_of_rank
from megatron_rb.parallel import context

TOKENS, GROUPS, HEAD_DIM = 24, 2, 3
BORDERS = (0, 7, 8, 20, 24)


@pytest.fixture
def group(lone_mesh):
    return lone_mesh.cp_group


def drawn() -> torch.Tensor:
    return torch.randn(TOKENS, GROUPS, HEAD_DIM)


def rows_of(rank: int, cp_size: int) -> torch.Tensor:
    return torch.cat([torch.arange(*each) for each in ranges_of_rank(TOKENS, rank, cp_size)])


def held_by_all(k: torch.Tensor, v: torch.Tensor, cp_size: int) -> torch.Tensor:
    """What an all-gather gives: `[cp, 2, rows of a rank, ...]`."""
    return torch.stack([torch.stack([k, v])[:, rows_of(rank, cp_size)] for rank in range(cp_size)])


@pytest.mark.parametrize("cp_size", [1, 2, 3])
def test_pieces_of_what_all_ranks_hold_are_the_rows_of_the_ranges_in_order(cp_size):
    k, v = drawn(), drawn()
    everyone = held_by_all(k, v, cp_size)
    for ranges in ([(0, TOKENS)], [(3, 17)], [(5, 6), (0, 9), (8, 24)], [(12, 12)]):
        found = torch.cat([everyone[:1, :, :0].flatten(0, 1)[:2], *context._pieces(everyone, ranges)], dim=1)
        expected = [torch.cat([x[slice(*each)] for each in ranges]) for x in (k, v)]
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("cp_size", [2, 3])
def test_pieces_are_views_so_that_gradients_can_be_added_into_them(cp_size):
    everyone = torch.zeros(cp_size, 2, TOKENS // cp_size, GROUPS, HEAD_DIM)
    for piece in context._pieces(everyone, [(0, TOKENS), (4, 11)]):
        piece += 1
    for rank in range(cp_size):
        rows = rows_of(rank, cp_size)
        twice = ((rows >= 4) & (rows < 11)).float() + 1
        assert torch.equal(everyone[rank, 0, :, 0, 0], twice)


def test_keys_of_one_rank_are_its_own_rows(group):
    k, v = drawn(), drawn()
    keys, values = context.gather_keys(k, v, [(0, 8), (4, 24)], group)
    assert torch.equal(keys, torch.cat([k[:8], k[4:]])) and torch.equal(values, torch.cat([v[:8], v[4:]]))


def test_a_row_in_two_ranges_gets_both_gradients(group):
    found, expected = ([drawn().requires_grad_() for _ in range(2)] for _ in range(2))
    for mine, theirs in zip(found, expected, strict=True):
        theirs.data.copy_(mine.data)
    ranges, weights = [(0, 8), (4, 24)], torch.randn(28, GROUPS, HEAD_DIM)
    one = context.gather_keys(*found, ranges, group)
    other = [torch.cat([x[slice(*each)] for each in ranges]) for x in expected]
    for k, v in (one, other):
        (weights * k.sin() + weights.flip(0) * v.cos()).sum().backward()
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("cp_size", [1, 2, 3])
def test_ranges_of_all_ranks_give_every_token_the_keys_of_its_sample_up_to_itself(cp_size):
    """The contract between the cut of the token axis and the gathered keys, on numbered rows."""
    numbers = torch.arange(TOKENS).float()[:, None, None].expand(-1, GROUPS, HEAD_DIM)
    everyone = held_by_all(numbers, numbers, cp_size)
    for rank in range(cp_size):
        parts = parts_in(BORDERS, ranges_of_rank(TOKENS, rank, cp_size))
        keys = torch.cat([piece[0, :, 0, 0] for piece in context._pieces(everyone, parts.key_ranges)]).int().tolist()
        rows, key, row = rows_of(rank, cp_size).tolist(), 0, 0
        for length, key_length in zip(parts.lengths, parts.key_lengths, strict=True):
            last = rows[row + length - 1]
            begin = max(border for border in BORDERS if border <= last)
            assert keys[key : key + key_length] == list(range(begin, last + 1))
            key, row = key + key_length, row + length
        assert (key, row) == (len(keys), len(rows))


def test_rows_of_one_rank_are_those_of_all(group):
    rows = drawn().requires_grad_()
    found = context.gather_rows(rows, group)
    found.sum().backward()
    assert torch.equal(found, rows) and torch.equal(rows.grad, torch.ones_like(rows))
