"""flash-attn as rehearsals stand in for it: steps of tiny models, and wrong calls that are named by their lines."""

import numpy as np
import pytest

from megatron_rb.rehearsal.arithmetic import visible_pairs
from megatron_rb.shapes.families import NEWEST
from megatron_rb.shapes.shape import load_shape
from tests.parity.tiny_models import write_model
from tests.rehearsal.conftest import rehearsed, request_of
from tests.rehearsal.planted import FAULTS_OF_CALLS

RELEASES = ("none", "flash_attn", "flash_attn_3", "flash_attn_4")


@pytest.fixture(scope="module", params=["qwen2_5_vl", NEWEST])
def by_release(request, tmp_path_factory):
    """The rehearsals of one family with every release."""
    folder = tmp_path_factory.mktemp(request.param)
    hf = write_model(folder / "hf", request.param, seed=1)
    shape = load_shape(hf)
    whole = f"P v*{shape.vision.num_layers} M E t*{shape.text.num_layers} L"
    requests = [request_of(hf, whole, packages=name, micro_batches=1) for name in RELEASES]
    return dict(zip(RELEASES, rehearsed(requests, folder), strict=True))


@pytest.mark.timeout(500)
@pytest.mark.parametrize("name", RELEASES[1:])
def test_a_step_with_a_release_has_no_defect_and_takes_it(name, by_release):
    summary = by_release[name]
    assert summary.defects == [] and list(summary.packages) == [name]
    lines = [line for _, line, _ in summary.stages[0].lines]
    assert any("kernels/varlen_attention/op.py:" in line and f" _{name} <" in line for line in lines), lines
    assert sum(count for _, _, count in summary.stages[0].waits) <= 2


@pytest.mark.parametrize("name", RELEASES[1:])
def test_every_release_does_the_arithmetic_of_the_others(name, by_release):
    assert by_release[name].stages[0].flops == by_release["none"].stages[0].flops
    assert by_release[name].stages[0].uncounted == by_release["none"].stages[0].uncounted == 0


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """By fault, the rehearsal of a run with flash-attn 2."""
    folder = tmp_path_factory.mktemp("planted_calls")
    hf = write_model(folder / "hf", "qwen3_vl", seed=1)
    shape = load_shape(hf)
    whole = f"P v*{shape.vision.num_layers} M E t*{shape.text.num_layers} L"
    requests = [
        request_of(hf, whole, f"name={name}", packages="flash_attn=2.8.3", micro_batches=1) for name in FAULTS_OF_CALLS
    ]
    found = rehearsed(requests, folder, "tests.rehearsal.planted:rehearse")
    return dict(zip(FAULTS_OF_CALLS, found, strict=True))


@pytest.mark.timeout(500)
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("keyword_of_another_library", "TypeError: flash_attn_varlen_func() got an unexpected keyword argument"),
        ("attention_in_fp32", "RuntimeError: FlashAttention only support fp16 and bf16 data type"),
        ("borders_of_64_bits", "RuntimeError: cu_seqlens_q must have dtype int32"),
        ("borders_in_a_row", "RuntimeError: cu_seqlens_q must have shape (batch_size + 1)"),
        ("lengths_for_borders", "RuntimeError: cu_seqlens_q are not the borders of"),
        ("longest_on_the_device", "TypeError: max_seqlen_q and max_seqlen_k must be int, not FakeTensor"),
    ],
)
def test_a_wrong_call_is_named_by_its_line(name, sentence, planted):
    text = " ".join(each.text for each in planted[name].defects if each.kind == "failure")
    assert sentence in text and "(kernels/varlen_attention/op.py:" in text, text


def test_attention_is_among_the_arithmetic(planted, by_release):
    assert planted["attention_left_out"].defects == []
    assert planted["attention_left_out"].stages[0].flops < 0.99 * by_release["none"].stages[0].flops


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (2, 0), (0, 3), (5, -1), (100, 100)])
def test_pairs_are_those_that_a_mask_leaves(window):
    queries, keys = [3, 0, 5, 1], [3, 2, 9, 1]
    pairs = sum(mask_of(*lengths, *window).sum() for lengths in zip(queries, keys, strict=True))
    borders = [tuple(np.cumsum([0, *lengths]).tolist()) for lengths in (queries, keys)]
    assert visible_pairs(*borders, *window) == pairs


def mask_of(queries: int, keys: int, left: int, right: int) -> np.ndarray:
    """True where a query sees a key; the last query's own key is the last."""
    distance = np.arange(keys)[None] - (np.arange(queries)[:, None] + keys - queries)
    seen = np.ones((queries, keys), dtype=bool)
    seen &= distance <= right if right >= 0 else True
    return seen & (-distance <= left if left >= 0 else True)
