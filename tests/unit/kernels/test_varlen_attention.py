"""Attention over packed sequences: the torch path against a softmax written out, and what others are called with."""

import sys
import types

import pytest
import torch

from megatron_rb.kernels.varlen_attention import cost, op, reference, torch_impl
from megatron_rb.kernels.varlen_attention.segments import Segments
from megatron_rb.kernels.varlen_attention.torch_impl import equal_runs


def brute_force(q, k, v, lengths, causal):
    """Every query against every key of its segment, one softmax at a time."""
    group = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    start = 0
    for length in lengths:
        for i in range(start, start + length):
            last = i + 1 if causal else start + length
            for head in range(q.shape[1]):
                keys, values = k[start:last, head // group], v[start:last, head // group]
                scores = keys @ q[i, head] / q.shape[2] ** 0.5
                out[i, head] = torch.softmax(scores, 0) @ values
        start += length
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("lengths", [[5, 1, 0, 7], [4, 4, 4], [9], [3, 3, 2, 2, 3]])
def test_equals_brute_force(lengths, groups, causal):
    torch.manual_seed(0)
    tokens = sum(lengths)
    q, k, v = torch.randn(tokens, 4, 8), torch.randn(tokens, groups, 8), torch.randn(tokens, groups, 8)
    truth = brute_force(q, k, v, lengths, causal)
    for attention in (op.varlen_attention, reference.varlen_attention):
        torch.testing.assert_close(attention(q, k, v, Segments.of_lengths(lengths), causal), truth)


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_equal_the_definition(causal):
    torch.manual_seed(0)
    segments = Segments.of_lengths([5, 0, 5, 2])
    q, k, v = (torch.randn(12, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    weights = torch.randn(12, 4, 8, dtype=torch.float64)
    results = [
        torch.autograd.grad((attention(q, k, v, segments, causal) * weights).sum(), (q, k, v))
        for attention in (op.varlen_attention, reference.varlen_attention)
    ]
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth)


def test_neighbours_of_one_length_are_one_call():
    assert equal_runs(Segments.of_lengths([4, 4, 4, 0, 2, 4])) == [(3, 4, 4), (1, 2, 2), (1, 4, 4)]
    keys = Segments.of_lengths([6, 4, 2])
    assert equal_runs(Segments.of_lengths([4, 4, 0]), keys) == [(1, 4, 6), (1, 4, 4), (1, 0, 2)]
    assert equal_runs(Segments.of_lengths([])) == equal_runs(Segments.of_lengths([0])) == []


QUERIES_AND_KEYS = [
    ([3, 4, 1, 2], [7, 4, 1, 5]),  # samples of which the first part is elsewhere, beside whole ones
    ([2, 0, 3], [2, 4, 3]),  # a part without queries
    ([4], [9]),
    ([2, 2, 0, 1], [6, 6, 0, 1]),
]


def masked(q, k, v, queries, keys, causal):
    """One fp64 softmax over all keys under one mask, made token by token."""
    mask = torch.zeros(q.shape[0], k.shape[0], dtype=torch.bool)
    row = column = 0
    for count, seen in zip(queries, keys, strict=True):
        for place in range(count):
            mask[row + place, column : column + (seen - count + place + 1 if causal else seen)] = True
        row, column = row + count, column + seen
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k).masked_fill(~mask, float("-inf")) / q.shape[2] ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("block", [2048, 2])
@pytest.mark.parametrize(("queries", "keys"), QUERIES_AND_KEYS)
def test_queries_at_the_end_of_longer_keys_equal_one_mask(queries, keys, block, groups, causal, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(torch_impl, "QUERY_BLOCK", block)
    shapes = (sum(queries), 4, 8), (sum(keys), groups, 8), (sum(keys), groups, 8)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    weights = torch.randn(shapes[0], dtype=torch.float64)
    truth = masked(*inputs, queries, keys, causal)
    expected = torch.autograd.grad((truth * weights).sum(), inputs)
    for attention in (op.varlen_attention, reference.varlen_attention):
        out = attention(*inputs, Segments.of_lengths(queries), causal, keys=Segments.of_lengths(keys))
        torch.testing.assert_close(out, truth)
        for ours, gradient in zip(torch.autograd.grad((out * weights).sum(), inputs), expected, strict=True):
            torch.testing.assert_close(ours, gradient)
    single = [x.detach().float() for x in inputs]
    out = op.varlen_attention(*single, Segments.of_lengths(queries), causal, keys=Segments.of_lengths(keys))
    torch.testing.assert_close(out, truth.detach().float())


def test_work_of_the_parts_of_a_sequence_is_that_of_the_whole():
    whole = cost.forward_flops([10, 4], 4, 8, causal=True)
    assert whole == 2 * (100 + 16) * 4 * 8
    parts = cost.forward_flops([3, 5, 2, 4], 4, 8, True, [3, 8, 10, 4])
    assert parts == whole and cost.forward_flops([3], 4, 8, False, [10]) == 4 * 30 * 4 * 8
    assert cost.forward_bytes(3, 4, 2, 8, 2, key_tokens=10) == 2 * (2 * 3 * 4 + 2 * 10 * 2) * 8


def test_no_tokens():
    empty = torch.empty(0, 2, 8)
    assert op.varlen_attention(empty, empty, empty, Segments.of_lengths([]), True).shape == (0, 2, 8)


@pytest.mark.parametrize("causal", [True, False])
def test_flash_attn_is_called_as_its_interface_wants(causal, monkeypatch):
    calls = []

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False):
        assert cu_seqlens_q.dtype == torch.int32
        calls.append((cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), max_seqlen_q, max_seqlen_k, causal))
        return q

    for name in ("flash_attn", "flash_attn_interface"):
        module = types.ModuleType(name)
        module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("flash_attn", "flash_attn_3"):
        monkeypatch.setattr(op, "choose", lambda *rest, name=name: name)
        q = torch.zeros(5, 2, 8)
        op.varlen_attention(q, q, q, Segments.of_lengths([2, 3]), causal)
        k = torch.zeros(8, 2, 8)
        op.varlen_attention(q, k, k, Segments.of_lengths([2, 3]), causal, keys=Segments.of_lengths([2, 6]))
    assert calls == [([0, 2, 5], [0, 2, 5], 3, 3, causal), ([0, 2, 5], [0, 2, 8], 3, 6, causal)] * 2


@pytest.mark.parametrize("causal", [True, False])
def test_flash_attn_4_is_called_by_name_and_its_log_sum_exp_is_dropped(causal, monkeypatch):
    calls = []

    def flash_attn_varlen_func(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, causal=False
    ):
        calls.append((qv, cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), max_seqlen_q, max_seqlen_k, causal))
        return q, None

    module = types.ModuleType("flash_attn.cute")
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", module)
    monkeypatch.setattr(op, "choose", lambda *rest: "flash_attn_4")
    q, k = torch.zeros(5, 2, 8), torch.zeros(8, 2, 8)
    assert op.varlen_attention(q, k, k, Segments.of_lengths([2, 3]), causal, keys=Segments.of_lengths([2, 6])) is q
    assert calls == [(None, [0, 2, 5], [0, 2, 8], 3, 6, causal)]


def test_torch_varlen_traces_on_a_fake_gpu(monkeypatch):
    """Arguments and shapes are what torch's own operator takes; nothing is computed."""
    pytest.importorskip("torch.nn.attention.varlen")
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(op, "choose", lambda *rest: "torch_varlen")
    segments = Segments.of_lengths([2, 3])
    with FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.empty(5, 4, 64, dtype=torch.bfloat16, device="cuda")
        k = torch.empty(5, 2, 64, dtype=torch.bfloat16, device="cuda")
        fake = Segments(segments.borders, torch.empty(3, dtype=torch.int32, device="cuda"), 3)
        for causal in (True, False):
            assert op.varlen_attention(q, k, k, fake, causal).shape == q.shape
            longer = Segments((0, 2, 9), torch.empty(3, dtype=torch.int32, device="cuda"), 7)
            more = torch.empty(9, 2, 64, dtype=torch.bfloat16, device="cuda")
            assert op.varlen_attention(q, more, more, fake, causal, keys=longer).shape == q.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(5, 3, 8), "v": torch.zeros(5, 3, 8)}, "q has 4 heads, k 3 and v 3"),
        ({"k": torch.zeros(4, 2, 8)}, r"k is torch.float32 \(4, 2, 8\) beside q"),
        (dict.fromkeys("qkv", torch.zeros(5, 4, 8).bool()), "q is torch.bool; it must be one of float16"),
        ({"v": torch.zeros(5, 2, 8).half()}, "v is torch.float16"),
        ({"segments": Segments.of_lengths([2, 2])}, "segments go from 0 to 4; they must cover all 5 rows"),
        ({"segments": Segments((0, 4, 3, 5), torch.zeros(4), 4)}, "segments have the border 3 after 4"),
        ({"keys": Segments.of_lengths([5])}, "there are 1 segments of keys and 2 of queries"),
        ({"keys": Segments.of_lengths([3, 2])}, "segment 1 has 3 queries and 2 keys"),
        ({"keys": Segments.of_lengths([5, 0]), "causal": False}, "segment 1 has 3 queries and 0 keys"),
        ({"keys": Segments.of_lengths([2, 4])}, "keys go from 0 to 6; they must cover all 5 rows"),
        ({"implementation": "flash_attn"}, "flash_attn was asked for, but it does not run on cpu"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    kv = torch.zeros(5, 2, 8)
    arguments = {"q": torch.zeros(5, 4, 8), "k": kv, "v": kv, "segments": Segments.of_lengths([2, 3]), "causal": True}
    with pytest.raises(ValueError, match=message):
        op.varlen_attention(**(arguments | change))


def test_segments_know_their_borders_on_host_and_device():
    segments = Segments.of_lengths([3, 0, 5])
    assert segments.borders == (0, 3, 3, 8)
    assert segments.cu_seqlens.tolist() == [0, 3, 3, 8] and segments.cu_seqlens.dtype == torch.int32
    assert segments.max_length == 5
    assert segments.to(torch.device("meta")).cu_seqlens.is_meta


def test_no_segments():
    segments = Segments.of_lengths([])
    assert segments.borders == (0,) and segments.max_length == 0
