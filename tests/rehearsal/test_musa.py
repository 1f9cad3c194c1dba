"""Runs on Moore Threads devices, rehearsed on tensors of type musa with the operators that the platform takes."""

import pytest

from megatron_rb.shapes.families import NEWEST
from megatron_rb.shapes.shape import load_shape
from tests.parity.tiny_models import write_model
from tests.rehearsal.conftest import rehearsed, request_of

DEGREES = {"one": {}, "pipeline": {"pp": 2}, "context": {"cp": 2}, "sequence_parallel": {"tp": 2, "sp": True}}


@pytest.fixture(scope="module", params=["qwen2_5_vl", NEWEST])
def summaries(request, tmp_path_factory):
    """The rehearsals of one family by degrees."""
    folder = tmp_path_factory.mktemp(request.param)
    hf = write_model(folder / "hf", request.param, seed=1)
    shape = load_shape(hf)
    vision, decoder = shape.vision.num_layers, shape.text.num_layers
    layouts = f"P v*{vision} M E t*{decoder} L", f"P v*{vision} M E t*1 | t*{decoder - 1} L"
    requests = [
        request_of(hf, layouts[degrees.get("pp", 1) - 1], "platform=musa", **degrees) for degrees in DEGREES.values()
    ]
    return dict(zip(DEGREES, rehearsed(requests, folder), strict=True))


@pytest.mark.timeout(500)
@pytest.mark.parametrize("name", DEGREES)
def test_a_step_has_no_defect_and_takes_torchs_operators(name, summaries):
    summary = summaries[name]
    assert summary.defects == [] and summary.device == "Moore Threads MTT S5000" and summary.launches == 0
    assert all(stage.flops > 0 and stage.uncounted == 0 for stage in summary.stages)
    lines = [line for stage in summary.stages for _, line, _ in stage.lines]
    assert any("kernels/rms_norm/op.py" in line for line in lines), lines
    assert not any("triton" in line or "liger" in line for line in lines), lines


def test_only_the_vocabulary_of_tensor_parallel_ranks_waits_beside_norm_and_sums(summaries):
    """The embedding of megatron-core puts a number where a mask is true, which CUDA alone does without a wait."""
    for name, summary in summaries.items():
        for stage in summary.stages:
            others = [line for kind, line, _ in stage.waits if kind == "index of booleans"]
            assert len(stage.waits) - len(others) <= 2, stage.waits
            assert all("tensor_parallel/layers.py" in line for line in others)
            assert bool(others) == (name == "sequence_parallel")
