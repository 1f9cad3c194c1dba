"""The random states of this rank, for a part of the model that runs a second time in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from megatron.core.tensor_parallel import random


def replayed() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts for the first pass, which begins now, and for the second, which draws the same numbers.

    Made for `torch.utils.checkpoint(..., preserve_rng_state=False, context_fn=replayed)`. torch itself knows nothing
    of megatron-core's tracker, and keeps a device's generator only where the vendor's module has the private name
    `_initialized`.
    """
    return nullcontext(), _with_states(random._get_all_rng_states())


@contextmanager
def _with_states(states: tuple[Any, Any, Any]) -> Iterator[None]:
    with random._fork_rng():
        random._set_all_rng_states(*states)
        yield
