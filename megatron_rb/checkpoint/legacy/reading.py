"""What one reading of a legacy checkpoint works with, and what it has to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_rb.checkpoint.hf.table import EMBEDDING, HEAD, WeightRule
from megatron_rb.checkpoint.legacy.layers import Dropped, Site
from megatron_rb.checkpoint.legacy.tree import LegacyTree
from megatron_rb.checkpoint.storage.tensors import FilePool


@dataclass(frozen=True)
class Reading:
    """A tree, the model it should hold, and notes for the user."""

    tree: LegacyTree
    sites: Sequence[Site]
    """In the order of the model's own state dict."""
    table: Mapping[str, WeightRule]
    """What the model stores; tied embeddings once."""
    tied: bool
    pool: FilePool
    dropped: Dropped
    warnings: list[str] = field(default_factory=list)

    def is_tied_copy(self, site: Site) -> bool:
        """Whether the site is the last stage's copy of tied embeddings."""
        return self.tied and site.native == HEAD

    def shape(self, site: Site) -> tuple[int, ...]:
        """Full native shape.

        Raises:
            ValueError: the model does not have this parameter.
        """
        rule = self.table.get(EMBEDDING if self.is_tied_copy(site) else site.native)
        if rule is None:
            raise ValueError(
                f"{site.describe(self.tree)} is {site.native}, which the model of config.json does not have; give the "
                "config.json of the model that was trained"
            )
        return rule.shape
