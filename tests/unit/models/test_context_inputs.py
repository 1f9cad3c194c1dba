"""The parts of a micro-batch on context-parallel ranks are together the whole one."""

import numpy as np
import pytest
import torch

from megatron_rb.data.padding import Size
from megatron_rb.layout.token_axis import ranges_of_rank
from megatron_rb.models.inputs import build_micro_batch
from megatron_rb.models.work import Work, work_of
from megatron_rb.parity.samples import draw_samples
from megatron_rb.shapes.shape import load_shape
from tests.parity.tiny_models import write_model


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def shape(request, tmp_path_factory):
    return load_shape(write_model(tmp_path_factory.mktemp("model") / "hf", request.param, seed=1))


def build(shape, samples, cp_rank=0, cp_size=1, **options):
    return build_micro_batch(
        samples, shape, tp_rank=0, tp_size=1, sequence_parallel=False, cp_rank=cp_rank, cp_size=cp_size, **options
    )


def merged_features(shape, vision):
    """A stand-in for the ViT: a row for every merged token that tells its pixels apart."""
    return vision.pixels.reshape(vision.num_patches // shape.vision.merge_unit, -1)


@pytest.mark.parametrize("padded", [Size(0, 0), Size(901, 1501)])
@pytest.mark.parametrize("cp_size", [2, 3])
def test_tokens_labels_and_pictures_are_those_of_the_whole(shape, cp_size, padded):
    samples = draw_samples(shape, 7, scale=2)
    whole = build(shape, samples, padded=padded)
    parts = [build(shape, samples, rank, cp_size, padded=padded) for rank in range(cp_size)]
    features = torch.cat([merged_features(shape, part.vision) for part in parts])
    tokens = parts[0].text.num_tokens * cp_size
    real = whole.text.num_real_tokens
    shown = torch.zeros(tokens, features.shape[1])
    ids, positions = torch.zeros(tokens, dtype=torch.int64), torch.zeros(3, tokens, dtype=torch.int32)
    labels = torch.full((tokens,), -100)
    for rank, part in enumerate(parts):
        text = part.text
        rows = torch.from_numpy(np.concatenate([np.arange(*each) for each in ranges_of_rank(tokens, rank, cp_size)]))
        assert text.num_real_tokens == int((rows < real).sum())
        ids[rows], positions[:, rows] = text.input_ids, text.positions
        shown[rows[text.visual.rows]] = features[text.visual.sources]
        labelled = text.label_weights > 0
        labels[rows[text.label_rows[labelled]]] = text.labels[labelled]
    assert torch.equal(ids[:real], whole.text.input_ids[:real]) and not ids[real:].any()
    assert torch.equal(positions[:, :real], whole.text.positions[:, :real])
    assert torch.equal(torch.nonzero(labels >= 0)[:, 0], whole.text.label_rows)
    assert torch.equal(labels[whole.text.label_rows], whole.text.labels)
    expected = torch.zeros_like(shown)
    expected[whole.text.visual.rows] = merged_features(shape, whole.vision)[whole.text.visual.sources]
    assert torch.equal(shown, expected)


@pytest.mark.parametrize("cp_size", [2, 3, 8])
def test_patches_are_even_and_work_adds_up(shape, cp_size):
    samples = draw_samples(shape, 3, scale=2)
    parts = [build(shape, samples, rank, cp_size) for rank in range(cp_size)]
    assert len({part.vision.num_patches for part in parts}) == 1
    works = [work_of(part) for part in parts]
    total = sum(works, Work())
    whole = work_of(build(shape, samples))
    assert total == Work(**(vars(whole) | {"samples": cp_size * whole.samples}))


def test_a_batch_without_samples_has_a_row_of_everything(shape):
    for rank in range(2):
        part = build(shape, [], rank, 2)
        assert part.num_labels == part.vision.num_real_patches == part.text.num_real_tokens == 0
        assert part.vision.num_patches > 0 and part.text.num_tokens == 2 and len(part.text.label_rows) == 1
        assert part.text.keys.segments.borders[-1] == sum(stop - start for start, stop in part.text.keys.ranges)
