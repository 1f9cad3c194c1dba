"""Adapters against peft: logits, gradients and optimizer steps under every way of cutting a model."""

import pickle

import pytest
import torch

from megatron_rb.parity.samples import draw_samples
from megatron_rb.shapes.families import FAMILIES
from megatron_rb.shapes.shape import load_shape
from tests.distributed.world import run_world
from tests.parity.layouts import context_layouts, layouts
from tests.parity.peft_models import load_adapted, run_adapted, write_adapter
from tests.parity.test_training_steps import LR, STEPS, losses_of, run_losses
from tests.parity.test_training_steps import SAMPLE_SEED as SAMPLE_SEED_OF_STEPS
from tests.parity.tiny_models import write_model

SAMPLE_SEED = 7
ADAPTERS = {
    "all": {"r": 3, "lora_alpha": 8, "target_modules": "all-linear"},
    "some": {
        "r": 5,
        "lora_alpha": 7,
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj", "attn.qkv", "up_proj"],
    },
}


def reference(hf, folder, adapter):
    torch.set_num_threads(1)
    trace = run_adapted(hf, adapter, draw_samples(load_shape(hf), SAMPLE_SEED), "lora")
    name = f"{hf.name}_{adapter.name}"
    (folder / f"{name}.pickle").write_bytes(pickle.dumps(trace))
    return {"hf": str(hf), "adapters": {"lora": str(adapter)}, "reference": name, "sample_seed": SAMPLE_SEED}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", list(FAMILIES))
def test_logits_and_gradients_of_the_factors_equal_pefts(family, tmp_path):
    hf = write_model(tmp_path / family, family, 1)
    shape = load_shape(hf)
    every = layouts(shape.vision.num_layers, shape.text.num_layers)
    context = context_layouts(shape.vision.num_layers, shape.text.num_layers)
    some = [every[3], every[6], every[8], context[1]]
    cases = []
    for number, (name, settings) in enumerate(ADAPTERS.items()):
        case = reference(hf, tmp_path, write_adapter(hf, tmp_path / name, number, **settings))
        cases += [case | cut for cut in ((*every, *context) if name == "all" else some)]
    results = run_world("tests.distributed.cases_parity:parity", 4, timeout=500, cases=cases, folder=str(tmp_path))[0]
    assert len(results) == len(cases)
    for result in results:
        assert result["failed"] == [] and result["first_parting"] is None, result
        assert result["gradients"] > 20


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("family", list(FAMILIES))
def test_ten_steps_give_pefts_losses_under_every_layout(family, tmp_path):
    hf = write_model(tmp_path / "model", family, 1)
    shape = load_shape(hf)
    adapter = write_adapter(hf, tmp_path / "adapter", 0, **ADAPTERS["all"])
    expected = losses_of(load_adapted(hf, adapter), shape)
    sizes = shape.vision.num_layers, shape.text.num_layers
    run = {"hf": str(hf), "lr": LR, "sample_seed": SAMPLE_SEED_OF_STEPS, "adapters": {"lora": str(adapter)}}
    cases = [run | cut | {"packed": False} for cut in (*layouts(*sizes), *context_layouts(*sizes))]
    for case, curve in zip(cases, run_losses(cases, timeout=1000), strict=True):
        assert curve == pytest.approx(expected, rel=1e-4), case


@pytest.mark.timeout(600)
def test_ten_steps_of_the_factors_give_pefts_losses_and_a_run_goes_on_under_another_layout(tmp_path):
    hf = write_model(tmp_path / "model", "qwen3_vl", 1)
    shape = load_shape(hf)
    adapter = write_adapter(hf, tmp_path / "adapter", 0, **ADAPTERS["all"])
    adapted = load_adapted(hf, adapter)
    expected = losses_of(adapted, shape)
    cuts = [cut for cut in layouts(shape.vision.num_layers, shape.text.num_layers) if "packed" not in cut]
    context = context_layouts(shape.vision.num_layers, shape.text.num_layers)
    cuts = [cuts[1], cuts[3], cuts[4], cuts[7], context[1]]
    cuts += [cuts[0] | {"distributed_optimizer": False}, cuts[1] | {"recompute": -1}]
    run = {"hf": str(hf), "lr": LR, "sample_seed": SAMPLE_SEED_OF_STEPS, "adapters": {"lora": str(adapter)}}
    half = str(tmp_path / "half")
    cases = [run | cut for cut in cuts]
    cases += [run | cuts[1] | {"save": half, "last": STEPS // 2}, run | cuts[2] | {"load": half}]
    *curves, first, rest = run_losses(cases)
    for case, curve in zip(cases, [*curves, first + rest], strict=False):
        assert curve == pytest.approx(expected, rel=1e-4), case
    assert expected[-1] < 0.97 * expected[0]


@pytest.mark.timeout(600)
def test_modules_that_are_trained_in_full_beside_factors_give_pefts_losses(tmp_path):
    hf = write_model(tmp_path / "model", "qwen3_vl", 0)
    shape = load_shape(hf)
    in_full = ["embed_tokens", "lm_head", "visual.merger"]
    adapter = write_adapter(hf, tmp_path / "adapter", 0, **ADAPTERS["some"], modules_to_save=in_full)
    expected = losses_of(load_adapted(hf, adapter), shape)
    every = layouts(shape.vision.num_layers, shape.text.num_layers)
    run = {"hf": str(hf), "lr": LR, "sample_seed": SAMPLE_SEED_OF_STEPS, "adapters": {"lora": str(adapter)}}
    cases = [run | {"train_in_full": in_full} | every[number] for number in (0, 6)]
    for case, curve in zip(cases, run_losses([case | {"packed": False} for case in cases]), strict=True):
        assert curve == pytest.approx(expected, rel=1e-4), case


@pytest.mark.timeout(200)
def test_tensor_parallel_ranks_drop_the_same_inputs_of_what_they_all_hold(tmp_path):
    """Their copies of a factor would part otherwise, without a word."""
    hf = write_model(tmp_path / "model", "qwen3_vl", 1)
    shape = load_shape(hf)
    every = layouts(shape.vision.num_layers, shape.text.num_layers)
    cases = [{"hf": str(hf)} | every[number] for number in (2, 3)]
    found = run_world("tests.distributed.cases_adapters:replicated_gradients", 4, timeout=150, cases=cases)[0]
    assert len(found) > 60 and {each["sp"] for each in found} == {False, True}
    for each in found:
        assert each["size"] > 0 and each["apart"] <= 1e-5 * each["size"], each
