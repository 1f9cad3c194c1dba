"""Which block of the model lives where: pure arithmetic, no torch."""

from megatron_rb.layout.blocks import Block, Kind, block_list
from megatron_rb.layout.layout import PipelineLayout, StageSlice, balanced_layout
from megatron_rb.layout.text import parse_layout

__all__ = ["Block", "Kind", "PipelineLayout", "StageSlice", "balanced_layout", "block_list", "parse_layout"]
