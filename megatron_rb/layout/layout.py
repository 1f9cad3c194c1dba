"""`PipelineLayout`: the one object that says which block lives on which pipeline rank and virtual chunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rb.layout.blocks import Block, Kind, block_list


@dataclass(frozen=True)
class StageSlice:
    """A contiguous run of blocks: what one model chunk holds."""

    index: int
    """Place in the pipeline: 0 is the first slice, `num_slices - 1` the last."""
    num_slices: int
    blocks: tuple[Block, ...]

    def has(self, kind: Kind) -> bool:
        return any(block.kind is kind for block in self.blocks)

    def layers(self, kind: Kind) -> tuple[int, ...]:
        """Global layer numbers of the vision or decoder layers in this slice."""
        return tuple(block.index for block in self.blocks if block.kind is kind)

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.num_slices - 1

    @property
    def needs_pixels(self) -> bool:
        return self.has(Kind.PATCH_EMBED)

    @property
    def needs_labels(self) -> bool:
        return self.has(Kind.HEAD)


@dataclass(frozen=True)
class PipelineLayout:
    """The block list cut into `pp_size * vpp_size` slices; slice i is chunk `i // pp_size` of rank `i % pp_size`."""

    num_vision_layers: int
    num_decoder_layers: int
    slice_lengths: tuple[int, ...]
    """Number of blocks in each slice."""
    pp_size: int

    def __post_init__(self) -> None:
        total = self.num_vision_layers + self.num_decoder_layers + 4
        if sum(self.slice_lengths) != total:
            raise ValueError(f"the slices hold {sum(self.slice_lengths)} blocks, the model has {total}")
        if min(self.slice_lengths) < 1:
            empty = self.slice_lengths.index(min(self.slice_lengths))
            raise ValueError(f"slice {empty} of the layout {self} is empty; give every slice at least one block")
        if self.pp_size < 1 or len(self.slice_lengths) % self.pp_size:
            raise ValueError(
                f"the layout has {len(self.slice_lengths)} slices, which pp_size {self.pp_size} does not divide; "
                f"write pp_size slices, or a multiple of it for interleaved 1F1B"
            )
        if self.pp_size == 1 and len(self.slice_lengths) > 1:
            raise ValueError(
                f"the layout has {len(self.slice_lengths)} slices and pp_size is 1, interleaved 1F1B needs 2 or more; "
                f"write the layout without '|', or set pp_size to {len(self.slice_lengths)}"
            )

    @property
    def num_slices(self) -> int:
        return len(self.slice_lengths)

    @property
    def vpp_size(self) -> int:
        """Virtual chunks per pipeline rank."""
        return self.num_slices // self.pp_size

    def slice(self, index: int) -> StageSlice:
        start = sum(self.slice_lengths[:index])
        blocks = block_list(self.num_vision_layers, self.num_decoder_layers)
        return StageSlice(index, self.num_slices, blocks[start : start + self.slice_lengths[index]])

    def slices_of_rank(self, pp_rank: int) -> tuple[StageSlice, ...]:
        """The slices of one pipeline rank, by virtual chunk."""
        return tuple(self.slice(chunk * self.pp_size + pp_rank) for chunk in range(self.vpp_size))

    def slice_of(self, kind: Kind, index: int = 0) -> int:
        """Number of the slice that holds a block."""
        wanted = Block(kind, index)
        for number in range(self.num_slices):
            if wanted in self.slice(number).blocks:
                return number
        raise ValueError(f"the layout has no block {kind.name} {index}")

    def pp_rank_of(self, kind: Kind, index: int = 0) -> int:
        """Pipeline rank that holds a block."""
        return self.slice_of(kind, index) % self.pp_size

    def __str__(self) -> str:
        return " | ".join(_print_slice(self.slice(i)) for i in range(self.num_slices))


def _print_slice(part: StageSlice) -> str:
    words: list[str] = []
    for kind in Kind:
        count = sum(block.kind is kind for block in part.blocks)
        if count:
            repeats = kind in (Kind.VISION, Kind.DECODER)
            words.append(f"{kind.value}*{count}" if repeats else kind.value)
    return " ".join(words)


def balanced_layout(costs: Sequence[float], num_vision_layers: int, pp_size: int, vpp_size: int = 1) -> PipelineLayout:
    """Cut the block list so that the most expensive slice is as cheap as possible (exact, by dynamic programming).

    Args:
        costs: cost of every block in block-list order, any unit.
    """
    count, parts = len(costs), pp_size * vpp_size
    if parts > count:
        raise ValueError(f"{count} blocks cannot fill {parts} slices; use a smaller pp_size")
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)
    # best[k][i]: smallest possible maximum when the first i blocks fill k slices; cut[k][i]: where slice k starts.
    best = [[float("inf")] * (count + 1) for _ in range(parts + 1)]
    cut = [[0] * (count + 1) for _ in range(parts + 1)]
    best[0][0] = 0.0
    for k in range(1, parts + 1):
        for i in range(k, count - (parts - k) + 1):
            for j in range(k - 1, i):
                value = max(best[k - 1][j], prefix[i] - prefix[j])
                if value < best[k][i]:
                    best[k][i], cut[k][i] = value, j
    lengths, end = [], count
    for k in range(parts, 0, -1):
        start = cut[k][end]
        lengths.append(end - start)
        end = start
    return PipelineLayout(num_vision_layers, count - num_vision_layers - 4, tuple(reversed(lengths)), pp_size)
