"""The fused projection and cross entropy on the torch path, against torch's own in fp64."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_rb.kernels.linear_cross_entropy import reference
from megatron_rb.kernels.linear_cross_entropy.op import chunk_rows, linear_cross_entropy

ROWS, HIDDEN, VOCABULARY = 13, 16, 50


def drawn(dtype=torch.float32, rows=ROWS):
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, HIDDEN, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=draw).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (rows,), generator=draw)
    weights = torch.rand(rows, generator=draw)
    return hidden, weight, labels, weights


def plain(hidden, weight, labels, weights):
    """Every logit in memory, in fp64."""
    losses = F.cross_entropy(hidden.double() @ weight.double().T, labels, reduction="none")
    return (losses * weights).sum()


@pytest.mark.parametrize("rows_at_a_time", [1, 5, 13, 100])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=str
)
def test_loss_and_gradients_equal_the_plain_way_in_fp64(dtype, tolerance, rows_at_a_time):
    hidden, weight, labels, weights = drawn(dtype)
    limit = rows_at_a_time * VOCABULARY * 4
    ours = linear_cross_entropy(hidden, weight, labels, weights, logits_bytes=limit)
    truth = plain(hidden, weight, labels, weights)
    assert ours.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(ours.double(), truth, rtol=tolerance, atol=0)
    # What follows scales the loss, as a schedule does.
    gradients = [torch.autograd.grad(side * 0.25, (hidden, weight)) for side in (ours, truth)]
    for mine, its in zip(*gradients, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), its.double(), rtol=0, atol=tolerance * its.abs().max().item())


def test_the_definition_is_torchs_cross_entropy():
    hidden, weight, labels, weights = drawn(torch.float64)
    torch.testing.assert_close(
        reference.linear_cross_entropy(hidden, weight, labels, weights), plain(hidden, weight, labels, weights)
    )


@pytest.mark.parametrize("chunk", [1, 1000])
def test_ignored_rows_and_rows_of_weight_zero_count_nothing(chunk):
    hidden, weight, labels, weights = drawn()
    labels[2], weights[7] = reference.IGNORED, 0.0
    kept = torch.tensor([row for row in range(ROWS) if row not in (2, 7)])
    ours = linear_cross_entropy(hidden, weight, labels, weights, logits_bytes=chunk)
    truth = plain(hidden[kept], weight, labels[kept], weights[kept])
    torch.testing.assert_close(ours.double(), truth)
    grads = [torch.autograd.grad(side, (hidden, weight)) for side in (ours, truth)]
    assert not grads[0][0][2].any() and not grads[0][0][7].any()
    for mine, its in zip(*grads, strict=True):
        torch.testing.assert_close(mine, its)


def test_a_batch_without_labels_has_no_loss_and_zero_gradients():
    hidden, weight, labels, _ = drawn(rows=1)
    loss = linear_cross_entropy(hidden, weight, labels, torch.zeros(1))
    assert loss == 0.0
    assert not any(grad.any() for grad in torch.autograd.grad(loss, (hidden, weight)))
    empty = linear_cross_entropy(hidden[:0], weight, labels[:0], torch.zeros(0))
    assert empty == 0.0 and not torch.autograd.grad(empty, weight)[0].any()


def test_large_logits_do_not_overflow():
    hidden, weight, labels, weights = drawn()
    batch = (hidden.detach() * 300).requires_grad_(), weight, labels, weights
    ours, truth = linear_cross_entropy(*batch), plain(*batch)
    assert ours.isfinite()
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_what_is_trained_gets_a_gradient(frozen):
    hidden, weight, labels, weights = drawn()
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    free = weight if frozen == "hidden" else hidden
    (mine,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, weights), free)
    (its,) = torch.autograd.grad(plain(hidden, weight, labels, weights), free)
    torch.testing.assert_close(mine, its)


class LargestTensor(TorchDispatchMode):
    """Notes the most values a tensor has that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.values = max(self.values, x.numel())
        return out


def largest(run) -> int:
    with LargestTensor() as noted:
        run().backward()
    return noted.values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tensor_is_as_large_as_all_logits(dtype):
    rows = 400
    batch = drawn(dtype, rows)
    limit = 20 * VOCABULARY * 4
    assert largest(lambda: reference.linear_cross_entropy(*batch)) >= rows * VOCABULARY
    assert largest(lambda: linear_cross_entropy(*batch, logits_bytes=limit)) <= max(rows * HIDDEN, 20 * VOCABULARY)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm_.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("grad", "products"), [(True, 3), (False, 1)])
def test_an_evaluation_computes_no_gradients(grad, products):
    batch = drawn()
    with torch.set_grad_enabled(grad), Products() as counted:
        loss = linear_cross_entropy(*batch)
    assert counted.count == products
    torch.testing.assert_close(loss.double(), plain(*batch))


def test_chunks_are_few_and_equal():
    assert chunk_rows(1000, 10, 4 * 10 * 300) == 250  # four of 250 and not three of 300 and one of 100
    assert chunk_rows(5, 10, 1) == 1
    assert chunk_rows(0, 10, 400) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3, 5)}, r"hidden is torch.float32 \(3, 5\) and weight torch.float32 \(10, 4\)"),
        ({"hidden": torch.zeros(3, 4).int(), "weight": torch.zeros(10, 4).int()}, "hidden is torch.int32; it must be"),
        ({"weight": torch.zeros(10, 4).half()}, "weight torch.float16"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, r"labels has shape \(2,\); it must be \[rows\] = \[3\]"),
        ({"label_weights": torch.zeros(3, 1)}, r"label_weights has shape \(3, 1\)"),
        ({"labels": torch.zeros(3, dtype=torch.int32)}, "labels are torch.int32; they must be torch.int64"),
        ({"labels": torch.tensor([0, 10, 1])}, r"labels has 10; it must be one of 0..9, or -100"),
        ({"labels": torch.tensor([0, -1, 1])}, "labels has -1; it must be one of 0..9"),
        ({"logits_bytes": 0}, "logits_bytes is 0; it must be at least 1"),
        ({"implementation": "liger"}, "linear_cross_entropy=liger was asked for, but"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(10, 4),
        "labels": torch.tensor([0, 9, 1]),
        "label_weights": torch.ones(3),
    }
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**(arguments | change))
