"""A token that is generated sees what it would see if the whole sequence were computed again."""

import pytest
import torch

from megatron_rb.kernels.varlen_attention.segments import Segments
from megatron_rb.models.language.cache import DecoderCache
from megatron_rb.models.layers import LocalAttention

PACKED = LocalAttention(causal=True, implementation="torch")
CPU = torch.device("cpu")
HEADS, HEAD_DIM = 4, 8


def drawn(tokens: int, groups: int) -> list[torch.Tensor]:
    return [torch.randn(tokens, heads, HEAD_DIM) for heads in (HEADS, groups, groups)]


def below_each_other(sequences, rows) -> list[torch.Tensor]:
    """Queries, keys and values of some rows (a slice) of each sequence."""
    return [torch.cat([parts[which][some] for parts, some in zip(sequences, rows, strict=True)]) for which in range(3)]


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_every_token_attends_as_in_the_whole_sequence(groups):
    prompts, new = [3, 5, 1], 4
    sequences = [drawn(length + new, groups) for length in prompts]
    whole = [PACKED(*parts, Segments.of_lengths([len(parts[0])])) for parts in sequences]
    cache = DecoderCache(prompts, new, CPU)
    rows = [slice(0, length) for length in prompts]
    for step in range(new + 1):
        lengths = [some.stop - some.start for some in rows]
        found = cache.layer(0).attend(*below_each_other(sequences, rows), Segments.of_lengths(lengths), PACKED)
        expected = torch.cat([out[some] for out, some in zip(whole, rows, strict=True)])
        torch.testing.assert_close(found, expected, msg=f"pass {step}")
        rows = [slice(some.stop, some.stop + 1) for some in rows]
        if step < new:
            cache.advance()


def test_rows_of_padding_are_not_kept_and_get_zeros():
    cache = DecoderCache([2], 1, CPU)
    layer = cache.layer(0)
    q, k, v = drawn(4, 4)
    layer.attend(q, k, v, Segments.of_lengths([2, 2]), PACKED)
    assert torch.equal(layer.keys[0, :2], k[:2]) and not layer.keys[0, 2:].any()
    cache.advance()
    out = layer.attend(*drawn(3, 4), Segments.of_lengths([1] * 3), PACKED)
    assert out[0].any() and not out[1:].any()


def test_layers_keep_their_own_keys_under_their_global_number():
    cache = DecoderCache([1], 1, CPU)
    for number in (3, 7):
        cache.layer(number).attend(*drawn(1, 4), Segments.of_lengths([1]), PACKED)
    assert cache.layer(3) is cache.layer(3) and not torch.equal(cache.layer(3).keys, cache.layer(7).keys)


def test_there_is_room_for_the_longest_prompt_and_all_new_tokens():
    cache = DecoderCache([3, 5], 4, CPU)
    assert cache.capacity == 9
    for _ in range(4):
        cache.advance()
    assert cache.lengths.tolist() == [7, 9] and cache.present.places.tolist() == [6, 9 + 8]


def test_a_rank_without_a_sequence_goes_along():
    cache = DecoderCache([], 2, CPU)
    assert cache.num_sequences == 0
    cache.layer(0).attend(*drawn(1, 4), Segments.of_lengths([1]), PACKED)
    cache.advance()
    assert not cache.layer(0).attend(*drawn(1, 4), Segments.of_lengths([1]), PACKED).any()
