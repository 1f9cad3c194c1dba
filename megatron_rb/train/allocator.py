"""What happens to cached device memory when a micro-batch outgrows the padding, and how it is told."""

from __future__ import annotations

import logging

from megatron_rb.data.padding import PaddingPlan, fragmentation
from megatron_rb.platform import Platform

logger = logging.getLogger(__name__)


def release_cached_memory(platform: Platform, plan: PaddingPlan) -> None:
    """Give the cached blocks of the old sizes back, and log the fragmentation before and after."""
    before = _unused_share(platform)
    platform.empty_cache()
    logger.warning(
        "padding: a micro-batch outgrew %s, this step is padded to %s; cached memory without a tensor: %s before the "
        "clean-up, %s after",
        plan.outgrown,
        plan.sizes[0],
        before,
        _unused_share(platform),
    )


def _unused_share(platform: Platform) -> str:
    memory = platform.memory()
    share = fragmentation(memory.allocated, memory.reserved)
    return "not known" if share is None else f"{share:.1%}"
