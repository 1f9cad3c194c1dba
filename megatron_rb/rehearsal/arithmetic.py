"""FLOPs of a rehearsed rank: of products by their shapes, of attention by the borders that the host has sent."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import flop_registry

from megatron_rb.rehearsal.sites import site

FORWARD, BACKWARD = 4, 10
"""FLOPs of attention for a query, a key that it sees and one value of a head: two products, and five backward."""
UNLIMITED = (-1, -1)
"""A window of all keys, as flash-attn writes it."""


class Arithmetic:
    """Counts FLOPs since `restart`."""

    def __init__(self) -> None:
        self.flops = 0
        self.uncounted: Counter[str] = Counter()
        """Lines of attention whose borders the host does not know; their FLOPs are missing."""
        self._borders: dict[int, tuple[int, ...]] = {}

    def restart(self) -> None:
        self.flops, self.uncounted = 0, Counter()

    def sent(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """The host has copied a tensor to the device: remember those that may be borders of sequences."""
        if source.dtype is not torch.int32 or source.dim() != 1 or isinstance(source, FakeTensor):
            return
        storage = target.untyped_storage()
        self._borders[storage._cdata] = tuple(source.tolist())
        weakref.finalize(storage, self._borders.pop, storage._cdata, None)

    def borders_of(self, tensor: torch.Tensor) -> tuple[int, ...] | None:
        """The values of a tensor that the host has sent; None where it does not know them."""
        known = self._borders.get(tensor.untyped_storage()._cdata)
        return known if known is not None and len(known) == tensor.numel() else None

    def operator(self, func: Any, args: tuple[Any, ...], keywords: dict[str, Any], out: Any) -> None:
        """An operator of torch has run on the device."""
        name = func._schema.name
        if name in _VARLEN:
            self._varlen(name, _by_name(func, args, keywords))
            return
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            # Overloads that are told the type of their result have the formula of those that are not.
            known = args if "dtype" not in func._overloadname else [a for a in args if isinstance(a, torch.Tensor)]
            self.flops += formula(*known, **keywords, out_val=out)

    def windows(self, func: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """An operator of this package is about to run: its products, where a kernel has some."""
        each = _WINDOWS.get(func._schema.name)
        if each is not None:
            given = _by_name(func, args, keywords)
            _, _, heads, head_dim = given["qkv"].shape
            self.attention(each * heads * head_dim, given["borders"], given["borders"], UNLIMITED)

    def _varlen(self, name: str, given: dict[str, Any]) -> None:
        _, heads, head_dim = given["query"].shape
        left, right = given.get("window_size") or UNLIMITED
        keys = given["cu_seq_k"] if given["cu_seq_k"] is not None else given["cu_seq_q"]
        window = left, 0 if given.get("is_causal") else right
        self.attention(_VARLEN[name] * heads * head_dim, given["cu_seq_q"], keys, window)

    def attention(self, flops: int, queries: torch.Tensor, keys: torch.Tensor, window: tuple[int, int]) -> None:
        """Count attention over packed sequences.

        Args:
            flops: for a query and a key that it sees, of all heads.
            queries, keys: borders of the sequences, on the device.
            window: as `visible_pairs`.
        """
        seen = self.borders_of(queries), self.borders_of(keys)
        if seen[0] is None or seen[1] is None:
            self.uncounted[site()] += 1
        else:
            self.flops += flops * visible_pairs(seen[0], seen[1], *window)


_VARLEN = {"torch_attn::_varlen_attn": FORWARD, "torch_attn::_varlen_attn_backward": BACKWARD}
"""torch counts them as if every sequence were the longest, for a device without values."""
_WINDOWS = {"megatron_rb::window_attention": FORWARD, "megatron_rb::window_attention_backward": BACKWARD}


def current_arithmetic() -> Arithmetic | None:
    """That of the rehearsal that this thread is in; None outside of one."""
    found = (getattr(mode, "arithmetic", None) for mode in reversed(_get_current_dispatch_mode_stack()))
    return next((each for each in found if isinstance(each, Arithmetic)), None)


@lru_cache(maxsize=256)
def visible_pairs(queries: tuple[int, ...], keys: tuple[int, ...], left: int = -1, right: int = -1) -> int:
    """How many pairs of a query and a key that it sees there are in packed sequences.

    Args:
        queries, keys: borders of the sequences.
        left, right: keys before and after a query's own that it sees, the last query's being the last; -1 = all.
    """
    lengths = zip(_lengths(queries), _lengths(keys), strict=True)
    return sum(_pairs_of_one(each, seen, left, right) for each, seen in lengths)


def _pairs_of_one(queries: int, keys: int, left: int, right: int) -> int:
    if left < 0 and right < 0:
        return queries * keys
    own = np.arange(keys - queries, keys)
    first = np.maximum(own - left, 0) if left >= 0 else np.zeros_like(own)
    last = np.minimum(own + right, keys - 1) if right >= 0 else np.full_like(own, keys - 1)
    return int(np.maximum(last - first + 1, 0).sum())


def _lengths(borders: Sequence[int]) -> list[int]:
    return [stop - start for start, stop in pairwise(borders)]


def _by_name(func: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
    names = [argument.name for argument in func._schema.arguments]
    return dict(zip(names, args, strict=False)) | keywords
