"""Row maps and the row operators on the torch path."""

import numpy as np
import pytest
import torch

from megatron_rb.kernels.dynamic_padding import reference
from megatron_rb.kernels.dynamic_padding.op import add_rows, gather_rows, merge_rows
from megatron_rb.kernels.dynamic_padding.row_map import RowMap, padding, unpacking

MAP = RowMap.of(np.array([1, 2, 6, 0]), np.array([3, 0, 1, 4]), num_rows=8, num_sources=6)


def drawn(rows: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 5, generator=draw, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("mode", ["gather", "merge", "add"])
def test_values_equal_the_definition_and_gradients_finite_differences(mode):
    base, source = drawn(8, 0), drawn(6, 1)
    run = {
        "gather": lambda b, s: gather_rows(s, MAP),
        "merge": lambda b, s: merge_rows(b, s, MAP),
        "add": lambda b, s: add_rows(b, s, MAP),
    }[mode]
    assert torch.equal(run(base, source), reference.move_rows(source, base, MAP.index, mode))
    assert torch.autograd.gradcheck(run, (base, source))


def test_merge_equals_the_boolean_scatter_of_transformers():
    """transformers writes image features with `masked_scatter`, in order of appearance."""
    text, vision = drawn(8, 0).detach(), drawn(3, 1).detach()
    is_image = torch.tensor([0, 1, 1, 0, 0, 1, 0, 0], dtype=torch.bool)
    theirs = text.masked_scatter(is_image[:, None].expand_as(text), vision)
    where = RowMap.of(np.flatnonzero(is_image.numpy()), np.arange(3), 8, 3)
    assert torch.equal(merge_rows(text, vision, where), theirs)


def test_unpacking_equals_pad_sequence():
    parts = [drawn(length, length).detach() for length in (3, 1, 4)]
    where = unpacking([3, 1, 4], longest=4)
    padded = gather_rows(torch.cat(parts), where).view(3, 4, 5)
    assert torch.equal(padded, torch.nn.utils.rnn.pad_sequence(parts, batch_first=True))
    assert torch.equal(gather_rows(padded.flatten(0, 1), where.reversed()), torch.cat(parts))


def test_rows_of_several_dimensions_keep_their_shape():
    assert gather_rows(torch.ones(6, 2, 3), MAP).shape == (8, 2, 3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RowMap.of([8], [0], 8, 6), r"rows names row 8; it must be one of 0..7"),
        (lambda: RowMap.of([0], [-1], 8, 6), r"sources names row -1; it must be one of 0..5"),
        (lambda: RowMap.of([1, 1], [0, 2], 8, 6), "rows names row 1 twice"),
        (lambda: RowMap.of([1, 2], [3, 3], 8, 6), "sources names row 3 twice"),
        (lambda: RowMap.of([1, 2], [3], 8, 6), r"rows has shape \(2,\) and sources \(1,\)"),
        (lambda: unpacking([3, 5], 4), "longest is 4; it must hold every sequence, and one has 5 rows"),
        (lambda: padding(5, 4), "padded_rows is 4; it must be at least the 5 rows"),
        (lambda: gather_rows(torch.zeros(5, 2), MAP), r"source has shape \(5, 2\); the map needs \[6, ...\]"),
        (
            lambda: merge_rows(torch.zeros(8, 2), torch.zeros(6, 3), MAP),
            r"source has rows of \(3,\) and base of \(2,\)",
        ),
        (lambda: add_rows(torch.zeros(7, 2), torch.zeros(6, 2), MAP), r"base has shape \(7, 2\)"),
    ],
)
def test_wrong_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
