"""Every block of the ViT computes what transformers' own does with the same weights and the same input."""

import torch

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def our_order(pair, rows):
    """Padded like our batch: behind the patches of the sample come rows of zeros."""
    missing = pair.batch.vision.num_patches - len(rows)
    return torch.cat([rows, rows.new_zeros(missing, rows.shape[1])]).unsqueeze(1)


def test_patches_become_the_hidden_state_in_front_of_the_first_layer(pair):
    vision = pair.batch.vision
    found = pair.ours.vision.patch_embed(vision)
    torch.testing.assert_close(found[: vision.num_real_patches, 0], pair.taken[pair.theirs.model.visual.blocks[0]])


def test_every_layer_gives_what_transformers_layer_gives(pair):
    vision = pair.batch.vision
    for layer, block in zip(pair.ours.vision.layers.values(), pair.theirs.model.visual.blocks, strict=True):
        found = layer(our_order(pair, pair.taken[block]), vision)
        torch.testing.assert_close(found[: vision.num_real_patches, 0], pair.given[block], **CLOSE)


def test_layers_keep_to_windows_where_the_model_says_so(pair):
    shape = pair.shape.vision
    windowed = [layer.windowed for layer in pair.ours.vision.layers.values()]
    full = shape.full_attention_layers if shape.window_size else range(shape.num_layers)
    assert windowed == [index not in full for index in range(shape.num_layers)]


def test_no_patch_sees_another_frame(pair):
    """A change in the first picture leaves the rows of all others as they are, bit by bit."""
    vision = pair.batch.vision
    first = pair.sample.grids[0].patches
    state = torch.randn(vision.num_patches, 1, pair.shape.vision.hidden_size)
    changed = torch.cat([state[:first] + 1, state[first:]])
    for layer in pair.ours.vision.layers.values():
        one, other = layer(state, vision), layer(changed, vision)
        assert torch.equal(one[first:], other[first:]) and not torch.equal(one[:first], other[:first])


def test_the_merger_gives_a_token_of_the_text_for_every_unit_of_patches(pair):
    merger = pair.theirs.model.visual.merger
    found = pair.ours.vision.merger(pair.taken[merger].reshape(-1, 1, pair.shape.vision.hidden_size))
    torch.testing.assert_close(found[:, 0], pair.given[merger], **CLOSE)


def test_deepstack_mergers_normalise_the_joined_patches(pair):
    mergers = getattr(pair.theirs.model.visual, "deepstack_merger_list", [])
    ours = pair.ours.vision.deepstack
    assert len(ours) == len(mergers) == len(pair.shape.vision.deepstack_layers)
    for number, merger in enumerate(mergers):
        found = ours[str(number)](pair.taken[merger].reshape(-1, 1, pair.shape.vision.hidden_size))
        torch.testing.assert_close(found[:, 0], pair.given[merger], **CLOSE)
