"""Every block of the language model computes what transformers' own does with the same weights and the same input."""

import pytest
import torch
import torch.nn.functional as F

from megatron_rb.models.language.blocks import HeadOutput

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def final_state(pair):
    """What the head gets, `[tokens, 1, hidden]`."""
    return pair.taken[pair.theirs.model.language_model.norm].unsqueeze(1)


def test_visual_tokens_replace_their_placeholders(pair):
    merged = torch.randn(pair.batch.text.visual.num_sources, 1, pair.shape.text.hidden_size)
    found = pair.ours.language.embedding(pair.batch.text, merged)[:, 0]
    ids = pair.batch.text.input_ids
    expected = pair.theirs.model.language_model.embed_tokens(ids).clone()
    places = torch.isin(ids, torch.tensor([pair.shape.image_token_id, pair.shape.video_token_id]))
    expected[places] = merged[pair.batch.text.visual.sources, 0]
    assert places.any() and torch.equal(found, expected)


def test_without_visual_rows_an_embedding_is_that_of_the_tokens(pair):
    found = pair.ours.language.embedding(pair.batch.text, None)[:, 0]
    assert torch.equal(found, pair.theirs.model.language_model.embed_tokens(pair.batch.text.input_ids))


def test_every_layer_gives_what_transformers_layer_gives(pair):
    """DeepStack features are added behind a layer, by the stage, and are not in what the layer itself gives."""
    for layer, theirs in zip(pair.ours.language.layers.values(), pair.theirs.model.language_model.layers, strict=True):
        found = layer(pair.taken[theirs].unsqueeze(1), pair.batch.text)
        torch.testing.assert_close(found[:, 0], pair.given[theirs], **CLOSE)


def test_no_token_sees_a_later_one(pair):
    tokens, text = pair.batch.text.num_tokens, pair.batch.text
    state = torch.randn(tokens, 1, pair.shape.text.hidden_size)
    changed = torch.cat([state[:-5], state[-5:] + 1])
    layer = pair.ours.language.layers["0"]
    assert torch.equal(layer(state, text)[:-5], layer(changed, text)[:-5])


def test_logits_of_all_tokens_are_those_of_transformers(pair, final_state):
    found = pair.ours.language.head(final_state, pair.batch.text, HeadOutput.ALL_LOGITS)
    torch.testing.assert_close(found, pair.given[pair.theirs], **CLOSE)


def test_logits_of_labelled_rows_are_those_rows_of_all(pair, final_state):
    head, text = pair.ours.language.head, pair.batch.text
    every = head(final_state, text, HeadOutput.ALL_LOGITS)
    torch.testing.assert_close(head(final_state, text, HeadOutput.LABEL_LOGITS), every[text.label_rows])


def test_the_loss_is_the_sum_over_labels_of_the_cross_entropy(pair, final_state):
    text = pair.batch.text
    found = pair.ours.language.head(final_state, text, HeadOutput.LOSS)
    logits = pair.given[pair.theirs][text.label_rows]
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, F.cross_entropy(logits, text.labels, reduction="sum"), **CLOSE)
