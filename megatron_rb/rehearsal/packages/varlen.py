"""What the flash-attn releases have in common: how they refuse arguments, and the arithmetic of a call."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_rb.rehearsal.arithmetic import current_arithmetic

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Borders:
    """Where packed sequences begin, and the window in which they see each other."""

    queries: torch.Tensor
    """int32 `[sequences + 1]`"""
    keys: torch.Tensor
    window: tuple[int, int]
    """Keys before and after a query's own that it sees; -1 = all."""

    @property
    def sequences(self) -> int:
        return self.queries.numel() - 1

    def count(self, q: torch.Tensor, flops: int) -> None:
        """Count the arithmetic of one pass of `q` `[tokens, heads, head_dim]`.

        Args:
            flops: for a query, a key that it sees and a value of a head.
        """
        arithmetic = current_arithmetic()
        if arithmetic is not None:
            arithmetic.attention(flops * q.shape[1] * q.shape[2], self.queries, self.keys, self.window)


def check(condition: bool, words: str) -> None:
    """As TORCH_CHECK.

    Raises:
        RuntimeError: the condition does not hold.
    """
    if not condition:
        raise RuntimeError(words)


def check_operands(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dtypes: tuple[torch.dtype, ...], words: str):
    """Types, devices and strides that releases 2 and 3 ask for, in their order."""
    check(q.dtype in dtypes, words)
    check(k.dtype == q.dtype, "query and key must have the same dtype")
    check(v.dtype == q.dtype, "query and value must have the same dtype")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_device(tensor, name)
    for tensor in (q, k, v):
        check(tensor.stride(-1) == 1, "Input tensor must have contiguous last dimension")


def check_borders(tensor: torch.Tensor, name: str, words: str) -> None:
    """The type, place and order of `cu_seqlens`."""
    check(tensor.dtype == torch.int32, words)
    check_device(tensor, name)
    check(tensor.is_contiguous(), f"{name} must be contiguous")


def check_device(tensor: torch.Tensor, name: str) -> None:
    check(tensor.device.type == "cuda", f"{name} must be on CUDA")


def check_shape(tensor: torch.Tensor, name: str, shape: tuple[int, ...], words: str) -> None:
    check(tuple(tensor.shape) == shape, f"{name} must have shape {words}, here {shape}; it has {tuple(tensor.shape)}")


def check_heads(q: torch.Tensor, k: torch.Tensor) -> None:
    check(q.shape[-2] % k.shape[-2] == 0, "Number of heads in key/value must divide number of heads in query")


def check_values(borders: Borders, rows: int, key_rows: int) -> None:
    """Where the host knows the borders: that they cover the rows. No release looks; it would read other memory.

    Raises:
        RuntimeError: they do not.
    """
    arithmetic = current_arithmetic()
    for name, tensor, count in (("cu_seqlens_q", borders.queries, rows), ("cu_seqlens_k", borders.keys, key_rows)):
        known = arithmetic.borders_of(tensor) if arithmetic is not None else None
        if known is not None and (known[0] != 0 or known[-1] != count or list(known) != sorted(known)):
            raise RuntimeError(
                f"{name} are not the borders of {count} rows: they begin with {known[0]} and end with {known[-1]}"
            )


def contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """As `maybe_contiguous` of all releases."""
    return tensor.contiguous() if tensor.stride(-1) != 1 else tensor


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def check_longest(*lengths: object) -> None:
    """The longest sequences are numbers of the host.

    Raises:
        TypeError: one is not, and to read it the host would wait for the device.
    """
    for length in lengths:
        if not isinstance(length, int):
            raise TypeError(f"max_seqlen_q and max_seqlen_k must be int, not {type(length).__name__}")
