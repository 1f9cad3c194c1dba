"""A micro-batch that is padded holds the same samples and a longer tail."""

import numpy as np
import pytest
import torch

from megatron_rb.data.padding import Size
from megatron_rb.models.inputs import build_micro_batch, pinned, to_device
from megatron_rb.parity.samples import draw_samples
from megatron_rb.shapes.shape import load_shape
from tests.parity.tiny_models import write_model


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def shape(request, tmp_path_factory):
    return load_shape(write_model(tmp_path_factory.mktemp("model") / "hf", request.param, seed=1))


def build(shape, padded, tp_size=1):
    samples = draw_samples(shape, 7)
    options = {"tp_rank": 0, "tp_size": tp_size, "sequence_parallel": tp_size > 1}
    return build_micro_batch(samples, shape, **options, padded=padded)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_every_real_row_survives(shape, tp_size):
    plain, padded = build(shape, Size(0, 0), tp_size), build(shape, Size(701, 1501), tp_size)
    rows = shape.vision.merge_unit * tp_size
    assert padded.text.num_tokens == 701 + -701 % tp_size and padded.vision.num_patches == 1501 + -1501 % rows
    tokens, patches = plain.text.num_real_tokens, plain.vision.num_real_patches
    assert (padded.text.num_real_tokens, padded.vision.num_real_patches) == (tokens, patches)
    assert torch.equal(padded.text.input_ids[:tokens], plain.text.input_ids[:tokens])
    assert torch.equal(padded.vision.pixels[:patches], plain.vision.pixels[:patches])
    assert not padded.vision.pixels[patches:].any()
    for name in ("labels", "label_rows", "label_weights"):
        assert torch.equal(getattr(padded.text, name), getattr(plain.text, name))
    assert torch.equal(padded.text.visual.rows, plain.text.visual.rows)
    assert torch.equal(padded.text.visual.sources, plain.text.visual.sources)


def test_padding_attends_to_nothing_real(shape):
    padded = build(shape, Size(701, 1501))
    for segments, real in (
        (padded.vision.frames, padded.vision.num_real_patches),
        (padded.text.samples, padded.text.num_real_tokens),
    ):
        assert real in segments.borders
    if padded.vision.windows is not None:
        assert padded.vision.num_real_patches in padded.vision.windows.borders
        window = (shape.vision.window_size // shape.vision.patch_size) ** 2
        assert max(np.diff(padded.vision.windows.borders)) <= window


def test_a_size_below_the_samples_cuts_nothing(shape):
    plain, padded = build(shape, Size(0, 0)), build(shape, Size(1, 4))
    assert padded.text.num_tokens == plain.text.num_tokens
    assert padded.vision.num_patches == plain.vision.num_patches


def test_everything_that_goes_to_the_device_is_pinned(shape, monkeypatch):
    pinned_ones: set[int] = set()

    def pin(tensor):
        copy = tensor.clone()
        pinned_ones.add(copy.data_ptr())
        return copy

    moved: list[torch.Tensor] = []
    to = torch.Tensor.to

    def note(tensor, *arguments, **options):
        if tensor.numel() and options.get("non_blocking"):
            moved.append(tensor)
        return to(tensor, *arguments, **options)

    samples = draw_samples(shape, 7)
    batch = build_micro_batch(samples, shape, tp_rank=0, tp_size=1, sequence_parallel=False, cp_rank=1, cp_size=2)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    there = pinned(batch)
    monkeypatch.setattr(torch.Tensor, "to", note)
    to_device(there, shape, torch.device("cpu"))
    assert len(moved) > 15 and {tensor.data_ptr() for tensor in moved} <= pinned_ones
    assert torch.equal(there.vision.pixels, batch.vision.pixels)
    assert there.text.keys.segments.borders == batch.text.keys.segments.borders
