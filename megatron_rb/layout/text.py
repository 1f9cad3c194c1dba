"""The text form of a layout, e.g. `P v*20 | v*12 M E t*4 | t*12 | t*12 L`."""

from __future__ import annotations

import re

from megatron_rb.layout.blocks import Kind
from megatron_rb.layout.layout import PipelineLayout

_NAMES = {
    Kind.PATCH_EMBED: "patch embedding",
    Kind.VISION: "vision layer",
    Kind.MERGER: "merger",
    Kind.EMBEDDING: "embedding",
    Kind.DECODER: "decoder layer",
    Kind.HEAD: "head",
}
_WORD = re.compile(r"([A-Za-z])(?:\*(\d+))?")


def parse_layout(text: str, num_vision_layers: int, num_decoder_layers: int, pp_size: int) -> PipelineLayout:
    """Read the text form: letters `P v M E t L`, `x*n` repeats a block, `|` ends a slice.

    Raises:
        ValueError: an unknown letter, a missing, repeated or misplaced block, an empty slice, or a number of slices
            that pp_size does not divide.
    """
    slices = [_parse_slice(part, text) for part in text.split("|")]
    kinds = [kind for part in slices for kind in part]
    _check_counts(kinds, num_vision_layers, num_decoder_layers, text)
    order = list(Kind)
    for before, after in zip(kinds, kinds[1:], strict=False):
        if order.index(after) < order.index(before):
            raise ValueError(
                f"layout '{text}' puts a {_NAMES[after]} ({after.value}) after a {_NAMES[before]} ({before.value}); "
                f"the order of blocks is P v M E t L"
            )
    return PipelineLayout(num_vision_layers, num_decoder_layers, tuple(len(part) for part in slices), pp_size)


def _parse_slice(part: str, text: str) -> list[Kind]:
    kinds: list[Kind] = []
    for word in part.replace(",", " ").split():
        match = _WORD.fullmatch(word)
        if match is None or match[1] not in {kind.value for kind in Kind}:
            raise ValueError(
                f"layout '{text}' has the word '{word}'; write P (patch embedding), v (vision layer), M (merger), "
                f"E (embedding), t (decoder layer) or L (head), with *n to repeat, separated by spaces"
            )
        kinds += [Kind(match[1])] * int(match[2] or 1)
    if not kinds:
        raise ValueError(f"layout '{text}' has an empty slice; give every slice at least one block")
    return kinds


def _check_counts(kinds: list[Kind], num_vision_layers: int, num_decoder_layers: int, text: str) -> None:
    wanted = {kind: 1 for kind in Kind} | {Kind.VISION: num_vision_layers, Kind.DECODER: num_decoder_layers}
    for kind, count in wanted.items():
        found = kinds.count(kind)
        if found != count:
            verb = "misses" if found < count else "repeats"
            raise ValueError(
                f"layout '{text}' {verb} blocks: it has {found} x {_NAMES[kind]} ({kind.value}), the model has {count}"
            )
