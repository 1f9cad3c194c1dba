"""How losses of two runs are compared."""

from typing import Any

import pytest


def same_curve(losses: dict[int, float]) -> Any:
    """Equal up to the last bits of fp32: the order in which a sum is taken may depend on where its memory lies."""
    return pytest.approx(losses, rel=1e-6)
