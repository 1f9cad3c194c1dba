"""Transformer Engine as rehearsals stand in for it: steps of tiny models, and what would fail, by line."""

import pytest

from megatron_rb.shapes.families import NEWEST
from megatron_rb.shapes.shape import load_shape
from tests.parity.tiny_models import write_model
from tests.rehearsal.conftest import rehearsed, request_of
from tests.rehearsal.planted import FAULTS_OF_TRANSFORMER_ENGINE

DEGREES = {
    "one": {},
    "sequence_parallel": {"tp": 2, "sp": True},
    "pipeline": {"pp": 2, "dp": 2},
    "context": {"cp": 2},
}
ENGINE = "transformer_engine=2.9"


def layouts_of(hf):
    """A layout of one stage and one of two."""
    shape = load_shape(hf)
    vision, decoder = shape.vision.num_layers, shape.text.num_layers
    return f"P v*{vision} M E t*{decoder} L", f"P v*{vision} M E t*1 | t*{decoder - 1} L"


@pytest.fixture(scope="module", params=["qwen2_5_vl", NEWEST])
def summaries(request, tmp_path_factory):
    """The rehearsals of one family by degrees."""
    folder = tmp_path_factory.mktemp(request.param)
    hf = write_model(folder / "hf", request.param, seed=1)
    layouts = layouts_of(hf)
    requests = [
        request_of(hf, layouts[degrees.get("pp", 1) - 1], packages=ENGINE, **degrees) for degrees in DEGREES.values()
    ]
    return dict(zip(DEGREES, rehearsed(requests, folder), strict=True))


@pytest.mark.timeout(500)
@pytest.mark.parametrize("name", DEGREES)
def test_a_step_has_no_defect_and_takes_its_layers(name, summaries):
    summary = summaries[name]
    assert summary.defects == [] and summary.packages == {"transformer_engine": "2.9.0"}
    for stage in summary.stages:
        assert any("megatron/core/extensions/transformer_engine.py" in line for _, line, _ in stage.lines), stage.lines
        assert sum(count for _, _, count in stage.waits) <= 2
        assert stage.uncounted == 0


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Wrong calls, and runs whose attention depends on what else is installed."""
    folder = tmp_path_factory.mktemp("others")
    hf = write_model(folder / "hf", NEWEST, seed=1)
    whole, _ = layouts_of(hf)
    planted = [
        request_of(hf, whole, f"name={name}", packages=ENGINE, micro_batches=1) for name in FAULTS_OF_TRANSFORMER_ENGINE
    ]
    found = dict(
        zip(
            FAULTS_OF_TRANSFORMER_ENGINE,
            rehearsed(planted, folder / "planted", "tests.rehearsal.planted:rehearse"),
            strict=True,
        )
    )
    flash = ("", "flash_attn=2.8.1", "flash_attn=2.8.3")
    words = [",".join(filter(None, (ENGINE, release))) for release in flash]
    requests = [request_of(hf, whole, packages=word, device="a800", micro_batches=1) for word in words]
    return found | dict(zip(flash, rehearsed(requests, folder / "ampere"), strict=True))


def failure(summary) -> str:
    return " ".join(each.text for each in summary.defects if each.kind == "failure")


@pytest.mark.timeout(500)
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("te_borders_in_a_row", "cu_seqlens_q and cu_seqlens_q must both have shape [batch_size + 1]!"),
        ("te_keyword_of_another_release", "got an unexpected keyword argument 'cu_seqlens_k'"),
        (
            "te_attention_in_fp32",
            "No dot product attention backend is available for the provided inputs: torch.float32",
        ),
    ],
)
def test_a_wrong_call_is_named_by_its_line(name, sentence, others):
    text = failure(others[name])
    assert sentence in text and "(megatron/core/extensions/transformer_engine.py:" in text, text


def test_before_hopper_attention_takes_flash_attn_in_the_releases_it_supports(others):
    assert others["flash_attn=2.8.1"].defects == []
    assert "with flash-attn not installed (supported: 2.1.1 to 2.8.1)" in failure(others[""])
    assert "with flash-attn 2.8.3 (supported: 2.1.1 to 2.8.1)" in failure(others["flash_attn=2.8.3"])
