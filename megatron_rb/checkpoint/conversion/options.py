"""The words of the command line that conversions share."""

from __future__ import annotations

import re

import torch

from megatron_rb.platform.dtypes import DTYPES

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


def target_dtype(name: str) -> torch.dtype | None:
    """The type weights are converted to; None keeps theirs."""
    if name == "keep":
        return None
    if name not in DTYPES:
        raise ValueError(f"dtype '{name}' is not known; use keep, {' or '.join(DTYPES)}")
    return DTYPES[name]


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `500MB`, `2GiB` or a plain number."""
    match = SIZE.fullmatch(text.strip())
    if not match or float(match.group(1)) == 0:
        raise ValueError(f"'{text}' is not a size; write it like 5GB or 500MB")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))
