"""A tiny model, ready for training in a world of this process alone."""

import pytest
import torch

from megatron_rb.config.schema import Config
from megatron_rb.models.inputs import build_micro_batch
from megatron_rb.parallel.session import Session
from megatron_rb.parity.samples import draw_samples
from megatron_rb.platform import get_platform
from megatron_rb.shapes.balance import default_layout
from megatron_rb.shapes.shape import shape_from_dict
from megatron_rb.train.build import build_trainable
from tests.parity.tiny_models import MODELS


@pytest.fixture(scope="module")
def session(lone_mesh):
    shape = shape_from_dict(MODELS["qwen3_vl"][0](0).to_dict())
    return Session(get_platform("cpu"), lone_mesh, shape, default_layout(shape, 1), torch.device("cpu"))


@pytest.fixture
def config():
    config = Config()
    config.model.dtype = "fp32"
    config.parallel.overlap_grad_reduce = config.parallel.overlap_param_gather = False
    return config


@pytest.fixture
def trainable(session, config):
    return build_trainable(session, config, "random")


@pytest.fixture(scope="module")
def batches(session):
    """Two micro-batches: three samples with pictures and texts, then one more."""
    samples = draw_samples(session.shape, seed=0)[:4]
    options = {"tp_rank": 0, "tp_size": 1, "sequence_parallel": False}
    return [build_micro_batch(part, session.shape, **options) for part in (samples[:3], samples[3:])]
