"""Faults that are put into the product's code: each is named by what the rehearsal of its run says."""

import pytest

from megatron_rb.shapes.shape import load_shape
from tests.parity.tiny_models import write_model
from tests.rehearsal.conftest import rehearsed, request_of
from tests.rehearsal.planted import FAULTS

TWO_STAGES = ("wrong_dtype", "lost_message")


@pytest.fixture(scope="module")
def summaries(tmp_path_factory):
    """By fault, the rehearsal of a run of two ranks."""
    folder = tmp_path_factory.mktemp("planted")
    hf = write_model(folder / "hf", "qwen2_5_vl", seed=1)
    shape = load_shape(hf)
    vision, decoder = shape.vision.num_layers, shape.text.num_layers
    whole = f"P v*{vision} M E t*{decoder} L"
    cut = f"P v*{vision} M E t*1 | t*{decoder - 1} L"
    requests = [
        request_of(hf, cut, f"name={name}", pp=2)
        if name in TWO_STAGES
        else request_of(hf, whole, f"name={name}", tp=2, compiled=name.startswith("kernel"))
        for name in FAULTS
    ]
    found = rehearsed(requests, folder, "tests.rehearsal.planted:rehearse")
    return dict(zip(FAULTS, found, strict=True))


def defect(summaries, name: str, kind: str) -> str:
    """The texts of one kind, one after the other."""
    found = [each.text for each in summaries[name].defects if each.kind == kind]
    assert found, summaries[name].defects
    return "\n".join(found)


@pytest.mark.timeout(240)
def test_a_wait_in_a_block_is_named_by_its_line(summaries):
    waits = summaries["wait_in_a_block"].stages[0].waits
    assert any(kind == "value read" and "models/stage.py" in line for kind, line, _ in waits), waits


def test_a_tensor_that_is_kept_alive_is_among_the_lines_of_the_peak(summaries):
    lines = summaries["tensor_kept_alive"].stages[0].lines
    assert any("models/stage.py" in line and size >= 4 * 2**20 for _, line, size in lines), lines


def test_a_skipped_collective_names_both_ranks_and_lines(summaries):
    text = defect(summaries, "skipped_collective", "collective")
    assert "rank 0 calls allreduce" in text and "rank 1" in text and "tensor_parallel/mappings.py" in text
    assert "wait for ever" in defect(summaries, "skipped_collective", "deadlock")


def test_a_collective_of_another_size_is_named(summaries):
    text = defect(summaries, "wrong_size", "collective")
    assert text.count("calls allreduce of") == 2


def test_a_message_of_another_type_is_named(summaries):
    text = defect(summaries, "wrong_dtype", "message")
    assert "bfloat16" in text and "float32" in text and "message 1 from rank 0 to rank 1" in text
    assert "rank 1 (tp 0, pp 1, dp 0) fails in a step: ValueError: weight is torch.bfloat16 and x torch.float32" in (
        defect(summaries, "wrong_dtype", "failure")
    )


def test_a_lost_message_is_named(summaries):
    text = defect(summaries, "lost_message", "message")
    assert "from rank 1 to rank 0" in text and "makes no such call" in text


def test_a_swapped_order_is_named(summaries):
    text = defect(summaries, "swapped_order", "collective")
    assert "int64" in text and "float64" in text and "train/totals.py" in text


def test_a_kernel_that_does_not_compile_is_named(summaries):
    text = defect(summaries, "kernel_that_does_not_compile", "kernel")
    assert "_rows_kernel" in text and "does not compile for sm_90" in text
