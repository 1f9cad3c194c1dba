"""Steps of tiny models under the layouts of the parity tests, as ranks on CUDA devices would take them."""

import pytest

from megatron_rb.shapes.families import FAMILIES
from megatron_rb.shapes.shape import load_shape
from tests.parity.layouts import context_layouts, layouts
from tests.parity.tiny_models import write_model
from tests.rehearsal.conftest import rehearsed, request_of

READS = {"megatron/core/optimizer/clip_grads.py", "train/totals.py"}
"""Where a step may wait for the device: the norm of the gradients, and the sums of the world."""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_layout_runs_and_every_message_has_its_other_side(family, tmp_path):
    hf = write_model(tmp_path / "hf", family, seed=1)
    shape = load_shape(hf)
    sizes = shape.vision.num_layers, shape.text.num_layers
    cases = [*layouts(*sizes), *context_layouts(*sizes)]
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
