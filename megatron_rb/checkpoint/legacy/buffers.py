"""Where each parameter lies in the buffers of megatron-core's distributed optimizer, as arithmetic.

A buffer holds the parameters of one type and model chunk in reverse order. Saved, it has lost the padding at the end of
each bucket, but not the one between the parameters of a bucket.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ALIGNMENTS = (64, 1)
"""Elements to whose multiples the start of a parameter is padded within its bucket; early versions did not pad."""


@dataclass(frozen=True)
class Slot:
    """One parameter of a buffer."""

    num_elements: int
    is_shared_embedding: bool
    """A copy of tied embeddings on the first or last stage, which gets a bucket of its own."""


def buffer_layouts(slots: Sequence[Slot], bucket_sizes: Sequence[int | None]) -> Iterator[tuple[tuple[int, ...], int]]:
    """Every different `(start of each slot, length of the buffer)` that a version and its arguments may have produced.

    Args:
        slots: the parameters in the order of the model.
        bucket_sizes: elements that close a bucket; None = one bucket.
    """
    seen = set()
    for size in bucket_sizes:
        for alignment in ALIGNMENTS:
            for own_bucket in (True, False):
                layout = _layout(slots, size, alignment, own_bucket)
                if layout not in seen:
                    seen.add(layout)
                    yield layout


def bucket_sizes(args: Mapping[str, Any], num_elements: int, pp_rank: int, chunk: int) -> list[int | None]:
    """Bucket sizes that the training arguments may mean for one model chunk, most likely first."""
    default = max(40_000_000, 1_000_000 * int(args.get("data_parallel_size") or 1))
    sizes: list[int | None] = [args.get("ddp_bucket_size") or default]
    if args.get("ddp_num_buckets"):
        sizes.insert(0, num_elements // args["ddp_num_buckets"])
    # Only the first chunk of the first stage overlaps its reduction in buckets.
    overlapped = args.get("overlap_grad_reduce") and pp_rank == 0 and chunk == 0
    return [*sizes, None] if overlapped else [None, *sizes]


def _layout(
    slots: Sequence[Slot], bucket_size: int | None, alignment: int, own_bucket: bool
) -> tuple[tuple[int, ...], int]:
    starts = [0] * len(slots)
    origin, end, is_empty = 0, 0, True
    for number in reversed(range(len(slots))):
        slot = slots[number]
        alone = own_bucket and slot.is_shared_embedding
        start = -(-end // alignment) * alignment
        if alone and not is_empty:
            origin, start = origin + start, 0
        starts[number] = origin + start
        end, is_empty = start + slot.num_elements, False
        if alone or (bucket_size is not None and end >= bucket_size):
            origin, end, is_empty = origin + end, 0, True
    return tuple(starts), origin + end
