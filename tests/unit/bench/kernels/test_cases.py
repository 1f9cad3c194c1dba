"""Whatever the kernels are timed beside does the same work; found out on a CPU, before a GPU is rented for it."""

import pytest
import torch

from megatron_rb.bench.kernels.cases import Sizes, all_cases

TINY = Sizes(tokens=48, patches=128, rows=32, width=64, ffn=96, vocabulary=200, cache=0, dtype=torch.float32)
NEED_A_GPU = {
    "compiled rotary + torch varlen",
    "compiled rotary + flash-attn",
    "Liger",
    "Liger fused linear",
    "torch.compile",
}
CASES = all_cases(torch.device("cpu"), TINY)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_all_sides_compute_the_same(number):
    torch.manual_seed(0)
    case = CASES[number]()
    assert next(iter(case.sides)) == "ours" and case.bytes > 0
    assert set(case.at_least) <= set(case.sides)
    ours = flat(case.sides["ours"](0))
    others = [name for name in case.sides if name != "ours" and name not in NEED_A_GPU]
    assert others
    for name in others:
        for mine, its in zip(ours, flat(case.sides[name](0)), strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)


def flat(out) -> tuple[torch.Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)
