"""Steps of tiny models under the layouts of the parity tests, as ranks on CUDA devices would take them."""

import pytest

from megatron_rb.shapes.families import FAMILIES, NEWEST
from megatron_rb.shapes.shape import load_shape
from tests.parity.layouts import context_layouts, layouts
from tests.parity.tiny_models import write_model
from tests.rehearsal.conftest import rehearsed, request_of

READS = {"megatron/core/optimizer/clip_grads.py", "train/totals.py"}
"""Where a step may wait for the device: the norm of the gradients, and the sums of the world."""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_layout_runs_and_every_message_has_its_other_side(family, tmp_path):
    """All of them with the newest family, a third of them with the others."""
    hf = write_model(tmp_path / "hf", family, seed=1)
    shape = load_shape(hf)
    sizes = shape.vision.num_layers, shape.text.num_layers
    cases = [*layouts(*sizes), *context_layouts(*sizes)]
    cases = cases if family == NEWEST else cases[2::3]
    requests = []
    for case in cases:
        degrees = {name: value for name, value in case.items() if name not in ("layout", "packed")}
        taken = case["tp"] * case["pp"] * case.get("cp", 1)
        virtual = case["layout"].count("|") + 1 > case["pp"]
        requests.append(
            request_of(hf, case["layout"], **degrees, dp=4 // taken, micro_batches=case["pp"] if virtual else 2)
        )
    for case, summary in zip(cases, rehearsed(requests, tmp_path), strict=True):
        assert summary.defects == [], case
        assert len(summary.stages) == case["pp"] and summary.world_size == 4
        for stage in summary.stages:
            assert {line.split(":")[0] for _, line, _ in stage.waits} <= READS, case
            assert sum(count for _, _, count in stage.waits) <= 2, case
            assert sum(stage.kinds.values()) == pytest.approx(stage.peak_bytes, rel=0.01)


@pytest.mark.timeout(240)
def test_settings_that_change_what_a_rank_does(tmp_path):
    hf = write_model(tmp_path / "hf", "qwen3_vl", seed=1)
    shape = load_shape(hf)
    vision, decoder = shape.vision.num_layers, shape.text.num_layers
    cut = f"P v*{vision} M E t*1 | t*{decoder - 1} L"
    cases = {
        "recompute": ["model.recompute.vision=-1", "model.recompute.language=1"],
        "frozen": ["model.freeze.vision=true", "model.freeze.merger=true"],
        "plain": ["parallel.distributed_optimizer=false", "parallel.overlap_grad_reduce=false"],
        "fp32": ["model.dtype=fp32"],
    }
    requests = [request_of(hf, cut, *words, f"name={name}", tp=2, pp=2, sp=True) for name, words in cases.items()]
    whole = f"P v*{vision} M | E t*{decoder} L"
    requests.append(request_of(hf, whole, *cases["frozen"], "name=frozen_stage", pp=2))
    requests.append(request_of(hf, cut, "name=text", pp=2, mix=str(text_mix(tmp_path)), evaluation=True))
    found = {summary.name: summary for summary in rehearsed(requests, tmp_path)}
    assert all(summary.defects == [] for summary in found.values()), found
    activations = {name: summary.stages[0].kinds["activations"] for name, summary in found.items()}
    assert activations["recompute"] < activations["plain"]
    assert found["frozen"].stages[0].kinds["gradients"] < found["plain"].stages[0].kinds["gradients"]
    assert [stage.kinds["optimizer"] > 0 for stage in found["frozen_stage"].stages] == [False, True]


def text_mix(folder):
    """Samples without pictures."""
    path = folder / "text.yaml"
    words = ["name: text", "about: no pictures", "seq_length: 1536", "max_patches: 6144", "micro_batches: 2"]
    path.write_text("\n".join([*words, "samples: 64", "kinds: [{share: 1.0, text_tokens: [20, 100, 400]}]"]))
    return path
