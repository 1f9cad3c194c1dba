"""Windowed attention on the torch path, against transformers' vision attention."""

import pytest
import torch
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionAttention

from megatron_rb.kernels.varlen_attention.segments import Segments
from megatron_rb.kernels.window_attention import reference
from megatron_rb.kernels.window_attention.op import window_attention

HEADS, HEAD_DIM = 2, 20


def angles(patches: int):
    drawn = torch.rand(patches, HEAD_DIM // 2, generator=torch.Generator().manual_seed(3)) * 20
    return drawn.cos(), drawn.sin()


@pytest.mark.parametrize("lengths", [[16, 16, 16], [16, 8, 8, 4, 0]])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_equals_the_vision_attention_of_transformers(lengths, attention):
    torch.manual_seed(0)
    patches = sum(lengths)
    config = Qwen2_5_VLVisionConfig(hidden_size=HEADS * HEAD_DIM, num_heads=HEADS)
    config._attn_implementation = attention
    theirs = Qwen2_5_VLVisionAttention(config)
    x = torch.randn(patches, HEADS * HEAD_DIM, requires_grad=True)
    cos, sin = angles(patches)
    windows = Segments.of_lengths(lengths)
    doubled = tuple(torch.cat((part, part), -1) for part in (cos, sin))
    real = Segments.of_lengths([length for length in lengths if length])
    truth = theirs(x, real.cu_seqlens, position_embeddings=doubled)
    qkv = theirs.qkv(x).view(patches, 3, HEADS, HEAD_DIM)
    for ours in (window_attention, reference.window_attention):
        out = theirs.proj(ours(qkv, cos, sin, windows).flatten(1))
        torch.testing.assert_close(out, truth, rtol=1e-5, atol=1e-5)
        mine, its = (torch.autograd.grad(side.square().sum(), x, retain_graph=True)[0] for side in (out, truth))
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4)


def good():
    cos, sin = angles(12)
    return {"qkv": torch.zeros(12, 3, HEADS, HEAD_DIM), "cos": cos, "sin": sin, "windows": Segments.of_lengths([8, 4])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(12, HEADS, 3, HEAD_DIM)}, r"qkv has shape \(12, 2, 3, 20\); it must be \[patches, 3"),
        ({"qkv": torch.zeros(24, 3, HEADS, HEAD_DIM)[::2]}, "qkv has strides .* it must be packed"),
        ({"qkv": torch.zeros(12, 3, HEADS, 19)}, "head_dim of qkv is 19; it must be even"),
        ({"cos": torch.zeros(12, HEAD_DIM)}, r"cos has shape \(12, 20\)"),
        ({"windows": Segments.of_lengths([8, 5])}, "windows go from 0 to 13; they must cover all 12 rows"),
        ({"windows": Segments.of_lengths([8])}, "windows go from 0 to 8; they must cover all 12 rows"),
        ({"windows": Segments((0, 8, 4, 12), torch.zeros(4), 8)}, "windows have the border 4 after 8"),
        (
            {"qkv": torch.zeros(12, 3, HEADS, HEAD_DIM).long()},
            "qkv is torch.int64; it must be one of float16, bfloat16",
        ),
        ({"implementation": "triton"}, "window_attention=triton was asked for, but"),
        ({"implementation": "cutlass"}, "window_attention has no implementation 'cutlass'"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        window_attention(**(good() | change))
