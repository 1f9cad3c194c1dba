"""Planted defects are found at their block and operator; other layouts, kernels and types raise no alarm."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_rb.cli import main
from megatron_rb.comparison.numerics.captures import open_captures
from megatron_rb.comparison.numerics.comparison import NumericsComparison, compare_captures
from megatron_rb.shapes.shape import load_shape
from tests.distributed.forked import run_forked
from tests.distributed.launched import LAUNCHED
from tests.distributed.test_resume import inputs  # noqa: F401
from tests.distributed.world import run_world
from tests.parity.tiny_models import write_model

FAMILIES = ("qwen2_5_vl", "qwen3_vl")

SOUND = [
    ("fp32", "again"),
    ("fp32", "tp2"),
    ("fp32", "tp2_sp"),
    ("fp32", "pp2"),
    ("fp32", "recompute"),
    ("fp32", "packed"),
    ("fp32", "bf16"),
    ("bf16", "bf16_tp2"),
    ("bf16", "like_hf"),
    ("tp2_sp", "bf16"),
    ("fp32", "kernels"),
    ("fp32", "pp2_at_tap"),
]
ONCE = {"again", "tp2", "recompute", "packed", "bf16_tp2", "pp2_at_tap", "kernels"}
"""Ways that are run for one family only."""
ALARM_CASES = [(family, a, b) for family in FAMILIES for a, b in SOUND if family == "qwen3_vl" or not {a, b} & ONCE]
DEFECTS = {
    "epsilon": ("language.layers.1", "norm2"),
    "vision_epsilon": ("vision.layers.2", "norm1"),
    "heads": ("language.layers.2", "attention"),
    "vision_heads": ("vision.layers.1", "attention"),
    "accumulation": ("vision.layers.1", "fc2"),
    "dropout_1": ("language.layers.1", "activation"),
    "head_input": ("language.head", "receive"),
}
"""Planted on one side, the block and the operator that must be named."""
KERNELS = {"swiglu": "liger"}
"""Runs in Triton's interpreter, others take minutes there; a CPU takes torch's."""


def cases(folder: Path, family: str) -> list[dict]:
    """Every way a step of one model is captured."""
    hf = write_model(folder / f"hf_{family}", family, seed=1)
    shape = load_shape(hf)
    vision, text = shape.vision.num_layers, shape.text.num_layers
    one = {"hf": str(hf), "tp": 1, "pp": 1, "layout": f"P v*{vision} M E t*{text} L"}
    split, at_tap = (f"P v*{first} | v*{vision - first} M E t*{text} L" for first in (2, 1))
    planted = {
        "epsilon": ["epsilon", "language.layers.1.post_attention_norm", 1e-5],
        "vision_epsilon": ["epsilon", "vision.layers.2.norm1", 1e-5],
        "heads": ["swapped_heads", "language.layers.2.attention.core"],
        "vision_heads": ["swapped_heads", "vision.layers.1.attention.core"],
        "accumulation": ["bf16_accumulation", "vision.layers.1.mlp.linear_fc2"],
        "dropout_1": ["dropout", "language.layers.1.mlp", 1],
        "dropout_2": ["dropout", "language.layers.1.mlp", 2],
        "head_input": ["wrong_input", "language.head.norm"],
        "backward": ["backward", "language.layers.1.attention.linear_qkv"],
        "forward_tp2": ["swapped_heads", "language.layers.2.attention.core"],
    }
    if shape.vision.deepstack_layers:
        planted["deepstack_input"] = ["wrong_input", "vision.deepstack.1"]
    ways = {
        "fp32": one,
        "again": one,
        "tp2": one | {"tp": 2},
        "tp2_sp": one | {"tp": 2, "sp": True},
        "pp2": one | {"pp": 2, "layout": split},
        "pp2_at_tap": one | {"pp": 2, "layout": at_tap},
        "recompute": one | {"recompute": -1},
        "packed": one | {"packed": True},
        "bf16": one | {"dtype": "bf16"},
        "bf16_tp2": one | {"dtype": "bf16", "tp": 2},
        "like_hf": one | {"dtype": "bf16", "plant": ["like_hf"]},
        "kernels": one | {"kernels": KERNELS, "plant": ["math_attention"]},
        "other_batch": one | {"seed": 5},
        "other_weights": one | {"hf": str(with_one_other_value(hf, folder / f"other_{family}"))},
        **{name: one | {"plant": plant} for name, plant in planted.items()},
    }
    ways["forward_tp2"]["tp"] = 2
    kept = {name: way for name, way in ways.items() if family == "qwen3_vl" or name not in ONCE}
    return [way | {"name": f"{family}/{name}"} for name, way in kept.items()]


def with_one_other_value(hf: Path, copy: Path) -> Path:
    """The same model with one value of one weight changed by a thousandth."""
    shutil.copytree(hf, copy)
    file = copy / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight"))
    weights[name][3, 5] *= 1.001
    save_file(weights, file, {"format": "pt"})
    return copy


@pytest.fixture(scope="module")
def captures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("captures")
    every = [case for family in FAMILIES for case in cases(folder, family)]
    case, arguments = "tests.distributed.cases_numerics:capture", {"cases": every, "folder": str(folder)}
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRITON_INTERPRET", "1")
        run_world(case, 2, timeout=240, fresh=True, **arguments)  # the interpreter is chosen when triton is imported
    return folder


def compared(captures: Path, family: str, a: str, b: str) -> NumericsComparison:
    return compare_captures(*open_captures(captures / family / a, captures / family / b))


@pytest.mark.parametrize(("family", "a", "b"), ALARM_CASES)
def test_no_alarm_without_a_defect(captures, family, a, b):
    result = compared(captures, family, a, b)
    assert [str(item) for item in result.defects] == []
    assert result.identical == (b in ("again", "pp2", "pp2_at_tap", "recompute", "packed"))
    # Far from an alarm, and the operators really were computed again: all but embeddings.
    assert max(item.excess for item in result.operators) < 0.5
    assert {item.operator for item in result.operators if not item.by_definition and not item.backward} <= {
        "patch_embed",
        "embedding",
        "receive",
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("defect", DEFECTS)
def test_defect_is_found_at_its_block_and_operator(captures, family, defect):
    result = compared(captures, family, "fp32", defect)
    assert [(item.block, item.operator, item.side, item.backward) for item in result.defects] == [
        (*DEFECTS[defect], "B", False)
    ]
    assert compared(captures, family, defect, "fp32").defects[0].side == "A"


def test_input_that_is_not_the_output_of_the_block_before_is_found(captures):
    found = compared(captures, "qwen3_vl", "fp32", "deepstack_input").defects
    assert [(item.block, item.operator) for item in found] == [("vision.deepstack.1", "receive")]


@pytest.mark.parametrize("family", FAMILIES)
def test_other_dropout_seed_is_found_and_the_same_seed_is_not(captures, family):
    result = compared(captures, family, "dropout_1", "dropout_2")
    assert [(item.block, item.operator, item.side) for item in result.defects] == [
        ("language.layers.1", "activation", "A and B")
    ]
    assert compared(captures, family, "dropout_1", "dropout_1").identical


@pytest.mark.parametrize("family", FAMILIES)
def test_defect_is_found_beside_drift_of_another_layout_and_type(captures, family):
    for other in ("fp32", "bf16"):
        result = compared(captures, family, other, "forward_tp2")
        assert (result.defects[0].block, result.defects[0].operator) == DEFECTS["heads"]


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_gradient_is_found_in_the_backward_pass(captures, family):
    first = compared(captures, family, "fp32", "backward").defects[0]
    assert (first.block, first.operator, first.backward) == ("language.layers.1", "qkv", True)


@pytest.mark.parametrize("family", FAMILIES)
def test_drift_of_bf16_grows_and_is_no_defect(captures, family):
    outputs = [p.relative for p in compared(captures, family, "fp32", "bf16").points if p.point == "output"]
    assert 1e-3 < outputs[0] < outputs[-1] < 0.1


@pytest.mark.parametrize(
    ("other", "words"),
    [("other_batch", "different batches"), ("other_weights", "different weights")],
)
def test_other_input_is_refused_with_what_differs(captures, capsys, other, words):
    folders = [str(captures / "qwen3_vl" / name) for name in ("fp32", other)]
    assert main(["compare", "numerics", *folders]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert words in said and "; " in said


def test_other_model_is_refused(captures, capsys):
    assert main(["compare", "numerics", *(str(captures / family / "fp32") for family in FAMILIES)]) == 2
    assert "different models: family" in " ".join(capsys.readouterr().err.split())


def test_report_names_the_defect(captures, capsys, tmp_path):
    folders = [str(captures / "qwen3_vl" / name) for name in ("fp32", "heads")]
    assert main(["compare", "numerics", *folders, "--out", str(tmp_path)]) == 1
    assert "defect in language.layers.2: attention on side B" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "class=bad" in page
    assert json.loads((tmp_path / "result.json").read_text())["defects"][0]["block"] == "language.layers.2"


def test_step_of_a_run_equals_the_captured_recipe_under_another_layout(inputs, tmp_path, capsys):  # noqa: F811
    settings = [
        f"model.hf_path={inputs / 'hf'}",
        "model.dtype=fp32",
        f"data.train=[{inputs / 'heldout.jsonl'}]",
        "data.seq_length=512",
        "data.max_patches=1024",
        "data.global_batch_size=4",
        "schedule.train_steps=3",
        "checkpoint.save_every=0",
        "metrics.tensorboard=false",
        "metrics.plots=false",
        "platform.name=cpu",
    ]
    rb(tmp_path, "launch", *settings, f"run_dir={tmp_path / 'run'}", "metrics.capture.every=2")
    assert [path.name for path in sorted((tmp_path / "run/captures").iterdir())] == ["step_00000001", "step_00000003"]
    rb(tmp_path, "compare", "capture", *settings, "parallel.tp_size=2", "--out", str(tmp_path / "captured"))
    assert main(["compare", "numerics", str(tmp_path / "run"), str(tmp_path / "captured"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert not result["identical"] and len(result["points"]) > 50


def rb(folder: Path, *words: str) -> None:
    done = run_forked(LAUNCHED, *words, folder=folder, timeout=200, merged=True)
    assert done.returncode == 0, done.stdout
