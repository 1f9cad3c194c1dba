"""How context-parallel ranks share the tokens of a micro-batch: pure arithmetic, no torch.

The token axis is cut into `2 * cp_size` equal chunks, and rank r holds chunks r and `2 * cp_size - 1 - r`: later
tokens attend to more keys, and this way every rank has the same work (Llama 3, section 3.3.2). Samples are packed one
after the other before the cut, so a chunk may begin and end inside a sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Range = tuple[int, int]
"""First row and the one behind the last."""


def token_multiple(cp_size: int, rows_split_over: int) -> int:
    """What the number of tokens of a micro-batch is a multiple of.

    Args:
        rows_split_over: ranks that share the rows of each context-parallel rank once more (sequence parallelism).
    """
    return cp_size * math.lcm(2, rows_split_over) if cp_size > 1 else rows_split_over


def ranges_of_rank(num_tokens: int, cp_rank: int, cp_size: int) -> list[Range]:
    """The tokens of a rank in rising order; its two chunks are one range where they touch."""
    chunk = num_tokens // (2 * cp_size)
    assert chunk * 2 * cp_size == num_tokens, "tokens are padded before they are cut"
    first, second = ((index * chunk, (index + 1) * chunk) for index in (cp_rank, 2 * cp_size - 1 - cp_rank))
    return [(first[0], second[1])] if first[1] == second[0] else [first, second]


@dataclass(frozen=True)
class Parts:
    """The parts of packed samples that lie in some ranges, and the keys that causal attention reads for them."""

    lengths: tuple[int, ...]
    """Tokens of each part."""
    key_lengths: tuple[int, ...]
    """Tokens from the beginning of its sample to the end of the part."""
    key_ranges: tuple[Range, ...]
    """For each range the tokens that these keys are, one sample after the other; two may overlap."""


def parts_in(borders: Sequence[int], ranges: Sequence[Range]) -> Parts:
    """Cut samples with ranges.

    Args:
        borders: of the samples, from 0 to the number of tokens.
    """
    lengths, key_lengths, key_ranges = [], [], []
    for start, stop in ranges:
        touched = [
            (begin, max(begin, start), min(end, stop))
            for begin, end in zip(borders, borders[1:], strict=False)
            if max(begin, start) < min(end, stop)
        ]
        lengths += [last - first for _, first, last in touched]
        key_lengths += [last - begin for begin, _, last in touched]
        key_ranges += [(touched[0][0], stop)] if touched else []
    return Parts(tuple(lengths), tuple(key_lengths), tuple(key_ranges))
