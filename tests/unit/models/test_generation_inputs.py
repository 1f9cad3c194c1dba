"""What the stages read while answers are generated."""

import numpy as np
import pytest
import torch

from megatron_rb.data.sample import EncodedSample, VisionGrid
from megatron_rb.models.generation_inputs import first_new_positions, next_tokens, prompt_batch
from megatron_rb.parity.samples import draw_samples
from megatron_rb.shapes.shape import shape_from_dict
from tests.parity.tiny_models import MODELS


@pytest.fixture(scope="module", params=list(MODELS))
def shape(request):
    return shape_from_dict(MODELS[request.param][0](0).to_dict())


def batch_of(prompts, shape, tp_size=1):
    return prompt_batch(prompts, shape, tp_rank=0, tp_size=tp_size, sequence_parallel=tp_size > 1)


def test_logits_are_wanted_of_the_last_token_of_every_prompt(shape):
    prompts = draw_samples(shape, seed=0)
    text = batch_of(prompts, shape).text
    assert text.input_ids[text.label_rows].tolist() == [int(prompt.input_ids[-1]) for prompt in prompts]
    assert (text.label_rows + 1).tolist() == list(np.cumsum([len(prompt.input_ids) for prompt in prompts]))
    assert not text.label_weights.any()


def test_the_first_new_token_stands_behind_the_last_of_its_prompt(shape):
    prompts = draw_samples(shape, seed=0)
    batch = batch_of(prompts, shape)
    last = batch.text.positions[:, batch.text.label_rows].amax(0).numpy()
    assert first_new_positions(batch, len(prompts)).tolist() == (last + 1).tolist()


def test_a_long_video_before_a_short_text_counts_its_seconds():
    """transformers' `generate` goes on above the largest position, here that of the video's last frame."""
    shape = shape_from_dict(MODELS["qwen2_5_vl"][0](0).to_dict())
    grid = VisionGrid(5, 2, 2, "video", second_per_grid=10.0)
    ids = np.array([1, *[shape.video_token_id] * 5, 2], dtype=np.int32)
    pixels = [np.zeros((grid.patches, shape.vision.patch_dim), dtype=np.float32)]
    batch = batch_of([EncodedSample("video", ids, ids, (grid,), pixels)], shape)
    # Frames lie 2 positions a second, so 20 apart: the last one at 1 + 80.
    assert batch.text.positions[:, -1].tolist() == [2, 2, 2]
    assert first_new_positions(batch, 1).tolist() == [82]


def test_later_passes_have_one_token_of_each_sequence():
    text = next_tokens([7, 8, 9], np.array([4, 5, 6]), multiple=1)
    assert (text.num_tokens, text.num_real_tokens, text.samples.borders) == (3, 3, (0, 1, 2, 3))
    assert text.input_ids.tolist() == [7, 8, 9] and text.positions.tolist() == [[4, 5, 6]] * 3
    assert text.label_rows.tolist() == [0, 1, 2] and len(text.visual.rows) == 0


@pytest.mark.parametrize(("count", "multiple", "rows"), [(3, 2, 4), (4, 2, 4), (0, 1, 1), (0, 4, 4)])
def test_rows_are_padded_and_one_is_there_at_least(count, multiple, rows):
    text = next_tokens([5] * count, np.arange(count), multiple)
    assert text.num_tokens == len(text.input_ids) == rows and text.num_real_tokens == count
    assert torch.equal(text.label_rows, torch.arange(max(count, 1)))
