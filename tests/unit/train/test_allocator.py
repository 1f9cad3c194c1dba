"""What happens to cached device memory when a micro-batch outgrows the padding."""

import logging

from megatron_rb.data.padding import PaddingPlan, Size
from megatron_rb.platform.base import MemoryStats
from megatron_rb.platform.cpu import CpuPlatform
from megatron_rb.train.allocator import release_cached_memory


class CachingPlatform(CpuPlatform):
    """An allocator of which a third is unused until its cache is emptied."""

    def __init__(self) -> None:
        self.reserved = 150

    def memory(self) -> MemoryStats:
        return MemoryStats(allocated=100, reserved=self.reserved)

    def empty_cache(self) -> None:
        self.reserved = 100


def test_starting_anew_empties_the_cache_and_says_so(caplog):
    platform = CachingPlatform()
    with caplog.at_level(logging.WARNING):
        release_cached_memory(platform, PaddingPlan((Size(120, 800),), outgrown=Size(100, 800)))
    assert platform.reserved == 100
    (line,) = (record.message for record in caplog.records)
    assert "outgrew 100 tokens and 800 patches" in line and "padded to 120 tokens and 800 patches" in line
    assert "33.3% before the clean-up, 0.0% after" in line


def test_a_platform_that_does_not_tell_its_reserve_is_said_to_be_unknown(caplog):
    with caplog.at_level(logging.WARNING):
        release_cached_memory(CpuPlatform(), PaddingPlan((Size(120, 800),), outgrown=Size(100, 800)))
    assert "not known before the clean-up, not known after" in caplog.text
