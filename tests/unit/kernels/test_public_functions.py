"""What holds for every public function on the torch path: compiled in one graph and recomputed, the same values."""

import pytest
import torch

from tests.unit.kernels.public_functions import NAMES, case, gradients

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_a_graph_break(name):
    run, inputs = case(name, CPU, torch.float32)
    torch._dynamo.reset()
    out, eager = torch.compile(run, backend="aot_eager", fullgraph=True)(*inputs), run(*inputs)
    torch.testing.assert_close(out, eager)
    for mine, its in zip(gradients(out, inputs), gradients(eager, inputs), strict=True):
        torch.testing.assert_close(mine, its)


@pytest.mark.parametrize("name", NAMES)
def test_recomputed_it_gives_the_same_bits(name):
    run, inputs = case(name, CPU, torch.float32)
    again = torch.utils.checkpoint.checkpoint(run, *inputs, use_reentrant=False)
    eager = run(*inputs)
    assert torch.equal(again, eager)
    for mine, its in zip(gradients(again, inputs), gradients(eager, inputs), strict=True):
        assert torch.equal(mine, its)
