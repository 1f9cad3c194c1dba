"""Logits and gradients equal transformers' for random models of every family under every way of cutting them."""

import pickle

import pytest
import torch

from megatron_rb.checkpoint.hf.oracle import run_transformers
from megatron_rb.parity.samples import draw_samples
from megatron_rb.shapes.families import FAMILIES
from megatron_rb.shapes.shape import load_shape
from tests.distributed.world import run_world
from tests.parity.layouts import context_layouts, layouts
from tests.parity.peft_models import run_adapted, write_adapter
from tests.parity.tiny_models import write_model

SAMPLE_SEED = 7


def reference(folder, tmp_path):
    """The shape of a model, after transformers' logits and gradients for it have been written down."""
    shape = load_shape(folder)
    torch.set_num_threads(1)
    trace = run_transformers(folder, shape, draw_samples(shape, SAMPLE_SEED), grads=True)
    (tmp_path / f"{folder.name}.pickle").write_bytes(pickle.dumps(trace))
    return shape


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_layout_equals_transformers(family, tmp_path):
    cases = []
    for seed in (0, 1, 2):
        folder = write_model(tmp_path / f"{family}_{seed}", family, seed)
        shape = reference(folder, tmp_path)
        every = layouts(shape.vision.num_layers, shape.text.num_layers)
        context = context_layouts(shape.vision.num_layers, shape.text.num_layers)
        chosen = [*every, *context] if seed == 1 else [every[0], every[3], every[6], every[8], *context[:3]]
        cases += [{"hf": str(folder), "sample_seed": SAMPLE_SEED, **case} for case in chosen]
    results = run_world("tests.distributed.cases_parity:parity", 4, timeout=500, cases=cases, folder=str(tmp_path))[0]
    assert len(results) == len(cases)
    for result in results:
        assert result["failed"] == [] and result["first_parting"] is None, result
        assert result["gradients"] > 50


def test_transformer_engine_layers_equal_transformers(tmp_path):
    """Linears, norms and packed attention of Transformer Engine are built and fed right (a stand-in computes them)."""
    cases = []
    for family in FAMILIES:
        folder = write_model(tmp_path / family, family, seed=1)
        shape = reference(folder, tmp_path)
        every = layouts(shape.vision.num_layers, shape.text.num_layers)
        context = context_layouts(shape.vision.num_layers, shape.text.num_layers)
        cases += [
            {"hf": str(folder), "sample_seed": SAMPLE_SEED, **case}
            for case in (every[1], every[2], every[6], context[1])
        ]
    adapter = write_adapter(folder, tmp_path / "adapter", 0, r=3, target_modules="all-linear")
    trace = run_adapted(folder, adapter, draw_samples(shape, SAMPLE_SEED), "lora")
    (tmp_path / "adapted.pickle").write_bytes(pickle.dumps(trace))
    cases += [case | {"adapters": {"lora": str(adapter)}, "reference": "adapted"} for case in cases[-3:-1]]
    case = "tests.distributed.cases_parity:transformer_engine_parity"
    # megatron-core looks for Transformer Engine when it is imported.
    *results, calls = run_world(case, 4, timeout=400, fresh=True, cases=cases, folder=str(tmp_path))[0]
    assert len(results) == len(cases)
    for result in results:
        assert result["failed"] == [] and result["first_parting"] is None, result
        assert result["gradients"] > 50
    assert calls.keys() == {"linear", "rmsnorm", "layernorm", "attention"}
