"""Values that only a device has: what the host is told when it reads some."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from megatron_rb.train.totals import OWN_COUNTS


class Oracle:
    """Answers reads of the device. Any number is 1 and any truth is true: finite, positive, and more than nothing.

    What means that something has gone wrong when it is not 0 is told apart by the line that reads it.
    """

    def value(self, dtype: torch.dtype) -> bool | int | float:
        """One value."""
        if dtype == torch.bool:
            return True
        return 1.0 if dtype.is_floating_point else 1

    def values(self, shape: Sequence[int], dtype: torch.dtype, site: str) -> Any:
        """What `tolist` gives."""
        if "train/totals.py" in site:
            # The last is the loss, as bits.
            return [0 if name in ("stops", "bad_norms") else 1 for name in OWN_COUNTS] + [ONE_AS_BITS]
        flat = [self.value(dtype)] * math.prod(shape)
        return flat if len(shape) == 1 else torch.full(tuple(shape), self.value(dtype), dtype=dtype).tolist()


ONE_AS_BITS = int(torch.ones(1, dtype=torch.float64).view(torch.int64))
