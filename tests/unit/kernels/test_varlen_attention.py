import pytest
import torch

from megatron_rb.kernels.varlen_attention.reference import varlen_attention
from megatron_rb.kernels.varlen_attention.segments import Segments


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
@pytest.mark.parametrize("lengths", [[5, 1, 0, 7], [4, 4, 4], [9]])
def test_equals_brute_force(lengths, groups, causal):
    torch.manual_seed(0)
    tokens = sum(lengths)
    q, k, v = torch.randn(tokens, 4, 8), torch.randn(tokens, groups, 8), torch.randn(tokens, groups, 8)
    out = varlen_attention(q, k, v, Segments.of_lengths(lengths), causal)
    torch.testing.assert_close(out, brute_force(q, k, v, lengths, causal))


def test_segments_know_their_borders_on_host_and_device():
    segments = Segments.of_lengths([3, 0, 5])
    assert segments.borders == (0, 3, 3, 8)
    assert segments.cu_seqlens.tolist() == [0, 3, 3, 8] and segments.cu_seqlens.dtype == torch.int32
    assert segments.max_length == 5
    assert segments.to(torch.device("meta")).cu_seqlens.is_meta


def test_no_segments():
    segments = Segments.of_lengths([])
    assert segments.borders == (0,) and segments.max_length == 0
