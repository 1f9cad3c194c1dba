"""The sizes of the two halves of a model: the vision tower and the language model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VisionShape:
    """The ViT. All sizes are global (before tensor parallelism)."""

    num_layers: int
    hidden_size: int
    num_heads: int
    ffn_hidden_size: int
    gated_mlp: bool
    activation: str
    norm: str
    """`rmsnorm` or `layernorm`."""
    norm_eps: float
    patch_bias: bool
    patch_size: int
    temporal_patch_size: int
    in_channels: int
    spatial_merge_size: int
    out_hidden_size: int
    rope_theta: float
    window_size: int
    """Side of an attention window in pixels; 0 = every layer attends to the whole frame."""
    full_attention_layers: tuple[int, ...]
    position_grid_side: int
    """Side of the learned position grid that is interpolated to each image; 0 = none."""
    deepstack_layers: tuple[int, ...]
    """Vision layers after which a DeepStack merger takes the hidden state."""
    tokens_per_second: float
    """Temporal positions per second of video (Qwen2.5-VL); 0 = time is written as text (Qwen3-VL)."""

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def merge_unit(self) -> int:
        """Patches that become one token."""
        return self.spatial_merge_size**2

    @property
    def patch_dim(self) -> int:
        """Values of one flattened patch: channels x frames x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class TextShape:
    """The language model. All sizes are global (before tensor parallelism)."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    norm_eps: float
    qkv_bias: bool
    proj_bias: bool
    qk_norm: bool
    rope_theta: float
    mrope_section: tuple[int, ...]
    """Rotary frequencies given to time, height and width."""
    mrope_interleaved: bool
    max_positions: int
