"""A micro-batch reaches the device without a wait."""

import pytest
import torch

from megatron_rb.models.inputs import build_micro_batch, pinned, to_device
from megatron_rb.parity.samples import draw_samples
from megatron_rb.shapes.shape import load_shape
from tests.parity.tiny_models import write_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def test_a_pinned_micro_batch_is_moved_without_a_wait(tmp_path):
    shape = load_shape(write_model(tmp_path / "hf", "qwen3_vl", seed=1))
    batch = pinned(build_micro_batch(draw_samples(shape, 7), shape, tp_rank=0, tp_size=1, sequence_parallel=False))
    device = torch.device("cuda")
    to_device(batch, shape, device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = to_device(batch, shape, device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(there.vision.pixels.cpu(), batch.vision.pixels)
