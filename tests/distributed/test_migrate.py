"""A run that moves between clusters goes on as if it had stayed: through every layout, to musa and back."""

import pytest

from megatron_rb.checkpoint.conversion.verify import verify
from megatron_rb.models.robobrain.config import load_shape
from tests.distributed.world import run_world
from tests.parity.layouts import layouts
from tests.parity.tiny_models import write_model

STEPS, BROKEN_AFTER = 6, 3


@pytest.mark.parametrize(("family", "seed", "every"), [("qwen3_vl", 1, 1), ("qwen2_5_vl", 4, 3)])
def test_losses_go_on_through_every_layout(family, seed, every, tmp_path):
    """Each layout trains three steps, the next one continues from the migrated checkpoint. Seed 4 pads the ViT."""
    folder = write_model(tmp_path / "model", family, seed)
    shape = load_shape(folder)
    cuts = [c for c in layouts(shape.vision.num_layers, shape.text.num_layers) if "packed" not in c][::every]
    common = {"hf": str(folder), "lr": 1e-3, "sample_seed": 20, "dtype": "fp32"}
    cases = [common | cuts[0]]
    for number, cut in enumerate(cuts):
        after = cuts[(number + 1) % len(cuts)]
        saved, on_musa, back = (tmp_path / f"{number}-{name}" for name in ("saved", "musa", "back"))
        step = f"step_{BROKEN_AFTER:08d}"
        cases.append(common | cut | {"last": BROKEN_AFTER, "save": str(saved)})
        moves = [
            [str(saved / step), str(on_musa / step), "musa"],
            [str(on_musa / step), str(back / step), "cpu"],
        ]
        cases.append(common | after | {"migrate": moves, "load": str(back)})
    curves = run_world("tests.distributed.cases_training:losses", 4, timeout=500, cases=cases, steps=STEPS)[0]
    unbroken = curves[0]
    for number in range(len(cuts)):
        before, after = curves[1 + 2 * number], curves[2 + 2 * number]
        assert before + after == pytest.approx(unbroken, rel=1e-4), cuts[number]
        comparison = verify(tmp_path / f"{number}-saved", tmp_path / f"{number}-back")
        assert comparison.equal and comparison.compared > 100, comparison.differences
