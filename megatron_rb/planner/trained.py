"""Which weights of a model are trained: all of a part, none, or low-rank factors beside frozen linears."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_rb.planner.work import MERGER_PARTS, PARTS, VISION_PARTS, Part


@dataclass(frozen=True)
class PartFactors:
    """Factors beside the linears of one block of a part, on average over its blocks."""

    whole: float
    """Parameters that every tensor-parallel rank holds."""
    cut: float
    """Parameters that tensor-parallel ranks share."""
    columns: float
    """Ranks of all its adapted modules together: what lies between the factors for every row."""
    linears: Mapping[str, float]
    """Share of the blocks in which a linear is adapted, by the last word of its name."""

    def on_rank(self, tp_size: int) -> float:
        """Parameters on one rank."""
        return self.whole + self.cut / tp_size


@dataclass(frozen=True)
class Frozen:
    """Parts of the model that are not trained."""

    vision: bool = False
    merger: bool = False
    language: bool = False

    def __post_init__(self) -> None:
        if self.vision and self.merger and self.language:
            raise ValueError(
                "every part of the model is frozen, there is nothing to plan; unfreeze one in model.freeze"
            )

    def trains(self, part: Part) -> bool:
        """Whether the weights of a part are updated."""
        if part in VISION_PARTS:
            return not self.vision
        return not (self.merger if part in MERGER_PARTS else self.language)

    def passes_gradient(self, part: Part) -> bool:
        """Whether a part has to hand a gradient on: something in front of its last product is trained, its own norms
        and the earlier layers of its kind included.
        """
        if part is Part.PATCH_EMBED:
            return False
        if part in VISION_PARTS:
            return not self.vision
        return not (self.vision and self.merger) or (part not in MERGER_PARTS and not self.language)

    def factors(self, part: Part) -> PartFactors | None:
        """Low-rank factors beside the linears of a part."""
        return None

    def trained(self, part: Part, size: float, tp_size: int) -> float:
        """Parameters of a block on a rank that have gradient and optimizer state.

        Args:
            size: all parameters of the block on a rank, factors left out.
        """
        return size * self.trains(part)


@dataclass(frozen=True)
class Adapted(Frozen):
    """All weights are frozen but factors, and what is trained in full beside them."""

    by_part: Mapping[Part, PartFactors] = field(default_factory=dict)
    in_full: Mapping[Part, float] = field(default_factory=dict)
    """Share of the parameters of a part that are trained in full."""

    def trains(self, part: Part) -> bool:
        return self.in_full.get(part, 0.0) > 0

    def passes_gradient(self, part: Part) -> bool:
        before = PARTS[: PARTS.index(part) + 1]
        return part is not Part.PATCH_EMBED and any(each in self.by_part or self.trains(each) for each in before)

    def factors(self, part: Part) -> PartFactors | None:
        return self.by_part.get(part)

    def trained(self, part: Part, size: float, tp_size: int) -> float:
        factors = self.by_part.get(part)
        return size * self.in_full.get(part, 0.0) + (factors.on_rank(tp_size) if factors else 0.0)
