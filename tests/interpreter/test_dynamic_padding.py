"""The Triton row kernel against the definition and the torch path."""

import numpy as np
import pytest
import torch

from megatron_rb.kernels.dynamic_padding import reference
from megatron_rb.kernels.dynamic_padding.op import add_rows, gather_rows, merge_rows
from megatron_rb.kernels.dynamic_padding.row_map import RowMap, padding, unpacking

MAP = RowMap.of(np.array([1, 2, 6, 0]), np.array([3, 0, 1, 4]), num_rows=8, num_sources=6)
WIDTHS = (20, 4110)
"""Less and more than one block of columns."""


def drawn(rows: int, width: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


OPERATORS = {
    "gather": lambda base, source, implementation: gather_rows(source, MAP, implementation) + 0 * base,
    "merge": lambda base, source, implementation: merge_rows(base, source, MAP, implementation),
    "add": lambda base, source, implementation: add_rows(base, source, MAP, implementation),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("mode", list(OPERATORS))
def test_values_and_gradients_equal_definition_and_torch(mode, width, dtype):
    base, source = drawn(8, width, dtype, 0), drawn(6, width, dtype, 1)
    weights = drawn(8, width, dtype, 2).detach()
    out = OPERATORS[mode](base, source, "triton")
    assert torch.equal(out, reference.move_rows(source, base, MAP.index, mode))
    theirs = OPERATORS[mode](base, source, "torch")
    gradients = [torch.autograd.grad(side, (base, source), weights) for side in (out, theirs)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_pack_undoes_unpack_and_padding_is_zero():
    where = unpacking([3, 0, 2], longest=4)
    packed = drawn(5, 24, torch.float32, 0)
    padded = gather_rows(packed, where, "triton").view(3, 4, 24)
    assert torch.equal(padded[0, :3], packed[:3]) and torch.equal(padded[2, :2], packed[3:])
    assert not padded[0, 3:].any() and not padded[1].any() and not padded[2, 2:].any()
    assert torch.equal(gather_rows(padded.flatten(0, 1), where.reversed(), "triton"), packed)


def test_pad_to_a_bucket_and_back():
    rows = drawn(5, 24, torch.bfloat16, 0)
    where = padding(5, 8)
    padded = gather_rows(rows, where, "triton")
    assert padded.shape == (8, 24) and not padded[5:].any()
    assert torch.equal(gather_rows(padded, where.reversed(), "triton"), rows)


def test_compiles_without_a_graph_break():
    base, source = drawn(8, 20, torch.float32, 0), drawn(6, 20, torch.float32, 1)
    compiled = torch.compile(lambda b, s: merge_rows(b, s, MAP, "triton"), backend="aot_eager", fullgraph=True)
    eager = merge_rows(base, source, MAP, "triton")
    out = compiled(base, source)
    assert torch.equal(out, eager)
    gradients = [torch.autograd.grad(side.square().sum(), (base, source)) for side in (out, eager)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
