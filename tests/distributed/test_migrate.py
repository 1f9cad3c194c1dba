"""A run that moves between clusters goes on as if it had stayed: through every layout, to musa and back."""

import json
from pathlib import Path

import pytest

from megatron_rb.checkpoint.conversion.export_hf import export_checkpoint
from megatron_rb.checkpoint.conversion.from_megatron import convert_legacy
from megatron_rb.checkpoint.conversion.import_hf import import_folder
from megatron_rb.checkpoint.conversion.migrate import migrate_checkpoint
from megatron_rb.checkpoint.conversion.verify import verify
from megatron_rb.checkpoint.manifest import find_checkpoint
from megatron_rb.checkpoint.storage.torch_dist import read_dist_folder
from megatron_rb.shapes.shape import load_shape
from tests.distributed.forked import run_forked
from tests.distributed.world import run_world
from tests.parity.layouts import context_layouts, layouts
from tests.parity.tiny_models import write_model
from tests.unit.checkpoint.legacy.test_optimizer import written
from tests.unit.checkpoint.legacy.trees import UNEVEN

STEPS, BROKEN_AFTER = 6, 3


@pytest.mark.parametrize(("family", "seed", "every"), [("qwen3_vl", 1, 1), ("qwen2_5_vl", 4, 3)])
def test_losses_go_on_through_every_layout(family, seed, every, tmp_path):
    """Each layout trains three steps, the next one continues from the migrated checkpoint. Seed 4 pads the ViT."""
    folder = write_model(tmp_path / "model", family, seed)
    shape = load_shape(folder)
    cuts = [c for c in layouts(shape.vision.num_layers, shape.text.num_layers) if "packed" not in c][::every]
    cuts.append(context_layouts(shape.vision.num_layers, shape.text.num_layers)[4])
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
        assert random_states(tmp_path / f"{number}-saved") == random_states(tmp_path / f"{number}-back") != {}
        assert random_states(tmp_path / f"{number}-musa") == {}


def random_states(folder: Path) -> dict[str, bytes]:
    stored = read_dist_folder(find_checkpoint(folder))
    states = {}
    for name, blob in stored.objects.items():
        content = (stored.folder / blob.file).read_bytes()
        states[name] = content[blob.position : blob.position + blob.length]
    return states


def test_run_goes_on_from_a_legacy_checkpoint(tmp_path):
    """Its optimizer is restored under two layouts, and its weights give the loss that the Hugging Face folder gives."""
    root, hf, _ = written(tmp_path, UNEVEN)
    convert_legacy(root, tmp_path / "run" / "step_00000003", str(hf))
    common = {"hf": str(hf), "sample_seed": 20, "dtype": "bf16"}
    cuts = [
        {"tp": 1, "pp": 1, "layout": "P v*3 M E t*4 L"},
        {"tp": 2, "pp": 2, "layout": "P v*2 | v*1 M E t*4 L"},
    ]
    cases = [common | cuts[0] | {"lr": 0.0, "last": 2}]
    cases += [common | cut | {"lr": 1e-3, "load": str(tmp_path / "run"), "last": 5} for cut in cuts]
    fresh, *continued = run_world("tests.distributed.cases_training:losses", 4, timeout=300, cases=cases, steps=5)[0]
    for curve in continued:
        assert len(curve) == 2
        assert curve[0] == pytest.approx(fresh[1], rel=2e-2)  # bf16: sums of other orders round otherwise
        assert curve == pytest.approx(continued[0], rel=2e-2)


def test_forward_passes_are_equal_after_every_path(tmp_path):
    """DeepStack and windows: imported, migrated, exported and legacy weights give transformers' logits."""
    deepstack = write_model(tmp_path / "qwen3", "qwen3_vl", 1)
    import_folder(deepstack, tmp_path / "imported")
    migrate_checkpoint(tmp_path / "imported", tmp_path / "on_musa", "musa")
    export_checkpoint(tmp_path / "on_musa", tmp_path / "exported")
    root, windowed, _ = written(tmp_path / "legacy", UNEVEN)
    convert_legacy(root, tmp_path / "from_megatron", str(windowed))
    pairs = [
        (deepstack, tmp_path / "on_musa"),
        (deepstack, tmp_path / "exported"),
        (windowed, tmp_path / "from_megatron"),
    ]
    for one, other in pairs:
        command = ["convert", "verify", one, other, "--forward", "--json"]
        found = run_forked("megatron_rb.cli", *command, folder=tmp_path, timeout=200)
        assert found.returncode == 0, found.stderr
        result = json.loads(found.stdout[found.stdout.index("{\n") :])
        assert result["equal"] and result["forward"] <= 1e-4, (one, other, result["forward"])
