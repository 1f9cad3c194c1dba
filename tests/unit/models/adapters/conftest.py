"""A tiny model in a world of this process alone."""

import pytest
import torch

from megatron_rb.parallel.session import Session
from megatron_rb.platform import get_platform
from megatron_rb.shapes.balance import default_layout
from tests.unit.planner.cases import tiny


@pytest.fixture(scope="module")
def session(lone_mesh):
    shape = tiny()
    return Session(get_platform("cpu"), lone_mesh, shape, default_layout(shape, 1), torch.device("cpu"))
