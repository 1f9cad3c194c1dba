"""Movements of rows in plain torch: the definition."""

from __future__ import annotations

import torch


def move_rows(source: torch.Tensor, base: torch.Tensor, index: torch.Tensor, mode: str) -> torch.Tensor:
    """One row for every entry of `index`, which names a row of `source` or is negative.

    Args:
        source: `[source rows, width]`; base: `[rows, width]`; index: `[rows]`.
        mode: `gather`: the named row, or zeros. `merge`: the named row, or the row of `base`. `add`: the row of `base`
            plus the named one. `mask`: the row of `base`, or zeros where a row is named.
    """
    out = torch.zeros(index.shape[0], source.shape[1], dtype=source.dtype, device=source.device)
    for row, origin in enumerate(index.tolist()):
        named = source[origin] if origin >= 0 and mode != "mask" else torch.zeros_like(out[row])
        if mode == "add":
            out[row] = base[row] + named
        elif origin >= 0 or mode == "gather":
            out[row] = named
        else:
            out[row] = base[row]
    return out
