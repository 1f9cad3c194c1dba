"""The list of linears against transformers' modules."""

import pytest
import torch

from megatron_rb.checkpoint.hf.oracle import load_transformers
from megatron_rb.shapes.linears import linears
from megatron_rb.shapes.shape import load_shape
from tests.parity.tiny_models import MODELS, write_model


@pytest.mark.parametrize("family", list(MODELS))
def test_they_are_transformers_linears_but_the_head(family, tmp_path):
    folder = write_model(tmp_path / family, family, seed=0)
    theirs = {
        name: (module.out_features, module.in_features, module.bias is not None)
        for name, module in load_transformers(folder).named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    ours = {
        module.name: (module.outputs, linear.inputs, linear.bias)
        for linear in linears(load_shape(folder))
        for module in linear.modules
    }
    assert ours == theirs
