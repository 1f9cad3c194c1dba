"""The rotary operators on the torch path, against transformers' own functions."""

import pytest
import torch
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig

from megatron_rb.kernels.mrope import op, reference

TOKENS, HEADS, GROUPS, HEAD_DIM = 11, 4, 2, 128


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def positions():
    return torch.randint(0, 3000, (3, TOKENS), generator=torch.Generator().manual_seed(5))


def hf_angles(interleaved: bool, dtype: torch.dtype):
    """cos and sin `[1, tokens, head_dim]` as transformers' text model makes them."""
    section = [24, 20, 20] if interleaved else [16, 24, 24]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section}
    make = (
        (qwen3.Qwen3VLTextRotaryEmbedding, Qwen3VLTextConfig)
        if interleaved
        else (qwen2_5.Qwen2_5_VLRotaryEmbedding, Qwen2_5_VLTextConfig)
    )
    config = make[1](hidden_size=4 * HEAD_DIM, num_attention_heads=4, head_dim=HEAD_DIM, rope_parameters=rope)
    return make[0](config)(torch.empty(0, dtype=dtype), positions()[:, None])


def our_angles(interleaved: bool):
    section = (24, 20, 20) if interleaved else (16, 24, 24)
    return reference.mrope_angles(positions(), HEAD_DIM, 1e6, section, interleaved)


@pytest.mark.parametrize("interleaved", [True, False])
def test_angles_equal_transformers(interleaved):
    theirs = hf_angles(interleaved, torch.float32)
    for ours, full in zip(our_angles(interleaved), theirs, strict=True):
        assert torch.equal(torch.cat((ours, ours), -1), full[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
def test_like_hf_equals_transformers_text_bit_for_bit(interleaved, dtype):
    q, k = drawn(TOKENS, HEADS, HEAD_DIM, dtype=dtype), drawn(TOKENS, GROUPS, HEAD_DIM, dtype=dtype, seed=1)
    grads = drawn(TOKENS, HEADS, HEAD_DIM, dtype=dtype, seed=2), drawn(TOKENS, GROUPS, HEAD_DIM, dtype=dtype, seed=3)
    q.requires_grad_(), k.requires_grad_()
    ours = op.apply_mrope(q, k, *our_angles(interleaved), compute="like_hf")
    hf = qwen3.apply_rotary_pos_emb if interleaved else qwen2_5.apply_rotary_pos_emb
    batch = [x.transpose(0, 1)[None] for x in (q, k)]
    theirs = [x[0].transpose(0, 1) for x in hf(*batch, *hf_angles(interleaved, dtype))]
    gradients = [torch.autograd.grad(side, (q, k), grads) for side in (ours, theirs)]
    for mine, its in zip((*ours, *gradients[0]), (*theirs, *gradients[1]), strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vision_rotation_equals_transformers(dtype):
    rows = torch.randint(0, 60, (TOKENS, 2), generator=torch.Generator().manual_seed(1))
    cos, sin = reference.vision_angles(rows, 80, 10000.0)
    packed = drawn(TOKENS, 3, HEADS, 80, dtype=dtype).requires_grad_()
    q, k, _ = packed.unbind(1)
    ours = op.apply_mrope(q, k, cos, sin)
    theirs = qwen2_5.apply_rotary_pos_emb_vision(q, k, *(torch.cat((a, a), -1) for a in (cos, sin)))
    grads = [drawn(TOKENS, HEADS, 80, dtype=dtype, seed=7 + i) for i in (0, 1)]
    gradients = [torch.autograd.grad(side, packed, grads) for side in (ours, theirs)]
    for mine, its in zip((*ours, *gradients[0]), (*theirs, *gradients[1]), strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, its, rtol=8e-3 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_qk_norm_like_hf_equals_transformers_bit_for_bit(dtype):
    q, k = drawn(TOKENS, HEADS, HEAD_DIM, dtype=dtype), drawn(TOKENS, GROUPS, HEAD_DIM, dtype=dtype, seed=1)
    norms = [qwen3.Qwen3VLTextRMSNorm(HEAD_DIM).to(dtype) for _ in "qk"]
    for seed, norm in enumerate(norms):
        norm.weight.data.copy_(1 + 0.3 * drawn(HEAD_DIM, seed=seed))
    normed = [norm(x).transpose(0, 1)[None] for norm, x in zip(norms, (q, k), strict=True)]
    theirs = qwen3.apply_rotary_pos_emb(*normed, *hf_angles(True, dtype))
    weights = [norm.weight for norm in norms]
    ours = op.qk_norm_mrope(q, k, *weights, *our_angles(True), 1e-6, compute="like_hf")
    for mine, its in zip(ours, theirs, strict=True):
        assert torch.equal(mine, its[0].transpose(0, 1))
    fp32 = op.qk_norm_mrope(q, k, *weights, *our_angles(True), 1e-6)
    for mine, its in zip(fp32, ours, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, its, rtol=0, atol=0.05 if dtype == torch.bfloat16 else 1e-5)


def test_fp32_is_nearer_to_fp64_than_transformers_rounding():
    q, k = drawn(TOKENS, HEADS, HEAD_DIM, dtype=torch.bfloat16), drawn(TOKENS, GROUPS, HEAD_DIM, dtype=torch.bfloat16)
    angles = our_angles(True)
    truth = reference.apply_rope(q.double(), *(a.double() for a in angles))
    errors = [
        (op.apply_mrope(q, k, *angles, compute=compute)[0].double() - truth).abs().mean() for compute in op.COMPUTE
    ]
    assert errors[0] < 0.8 * errors[1]


def test_a_context_parallel_slice_needs_only_its_own_positions():
    q, k = drawn(TOKENS, HEADS, HEAD_DIM), drawn(TOKENS, GROUPS, HEAD_DIM, seed=1)
    mine = torch.tensor([0, 1, 2, 8, 9, 10])  # the first and the last part of the sequence, as a causal balance has it
    whole = op.apply_mrope(q, k, *our_angles(True))
    angles = reference.mrope_angles(positions()[:, mine], HEAD_DIM, 1e6, (24, 20, 20), True)
    for part, full in zip(op.apply_mrope(q[mine], k[mine], *angles), whole, strict=True):
        assert torch.equal(part, full[mine])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_rotation_and_its_gradient_equal_the_definition(dtype, tolerance):
    x, grad = drawn(17, 3, 3, 16, dtype=dtype).requires_grad_(), drawn(17, 3, 16, dtype=dtype, seed=1)
    angles = drawn(17, 8, seed=2) * 5
    results = []
    for apply in (op.apply_rope, reference.apply_rope):
        # As the model calls it: a slice of the fused projection, not contiguous.
        out = apply(x.unbind(2)[1], angles.cos(), angles.sin())
        results.append((out, *torch.autograd.grad(out, x, grad)))
    for ours, truth in zip(*results, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, truth, rtol=tolerance, atol=tolerance)


def test_a_quarter_turn_swaps_the_halves():
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    quarter, _ = op.apply_mrope(x, x, torch.zeros(1, 2), torch.ones(1, 2))
    assert quarter.tolist() == [[[-3.0, -4.0, 1.0, 2.0]]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(3, 2, 8).half()}, "q is torch.float16"),
        ({"q": torch.zeros(3, 16)}, r"q has shape \(3, 16\); it must be \[tokens, heads, head_dim\]"),
        ({"k": torch.zeros(3, 8, 2).transpose(1, 2)}, "k has strides"),
        ({"cos": torch.zeros(3, 8)}, r"cos has shape \(3, 8\)"),
        ({"sin": torch.zeros(3, 4).half()}, "sin is torch.float16; angles are fp32"),
        (
            {"q": torch.zeros(3, 2, 8).int(), "k": torch.zeros(3, 2, 8).int()},
            "q is torch.int32; it must be one of float16",
        ),
        ({"q": torch.zeros(3, 2, 7), "k": torch.zeros(3, 2, 7)}, "head_dim of q is 7; it must be even"),
        ({"compute": "bf16"}, "compute is 'bf16'; use fp32 or like_hf"),
        ({"implementation": "cutlass"}, "no implementation 'cutlass'; use auto, triton, torch"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"q": torch.zeros(3, 2, 8), "k": torch.zeros(3, 2, 8), "cos": torch.zeros(3, 4)}
    arguments |= {"sin": torch.zeros(3, 4)} | change
    with pytest.raises(ValueError, match=message):
        op.apply_mrope(**arguments)
