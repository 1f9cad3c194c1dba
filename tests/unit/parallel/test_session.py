"""The same world with another model on it."""

from dataclasses import replace

import pytest
import torch

from megatron_rb.layout import parse_layout
from megatron_rb.layout.mesh import RankGrid
from megatron_rb.parallel.mesh import Mesh
from megatron_rb.parallel.session import Session
from megatron_rb.platform.cpu import CpuPlatform
from tests.unit.planner.cases import tiny

SESSION = Session(
    CpuPlatform(), Mesh(RankGrid(pp_size=2)), tiny(), parse_layout("P v*3 M | E t*4 L", 3, 4, 2), torch.device("cpu")
)


def test_another_model_takes_the_same_ranks():
    shape, layout = tiny(2, 2), parse_layout("P v | v M E t*2 L", 2, 2, 2)
    assert SESSION.with_model(shape, layout) == replace(SESSION, shape=shape, layout=layout)


def test_a_model_that_is_cut_into_another_number_of_stages_or_chunks_is_a_mistake():
    for text, pp_size in (("P v*3 M E t*4 L", 1), ("P v | v*2 M | E t*2 | t*2 L", 2)):
        with pytest.raises(AssertionError):
            SESSION.with_model(tiny(), parse_layout(text, 3, 4, pp_size))
