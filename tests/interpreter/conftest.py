"""Tests of Triton kernels in Triton's interpreter; `tests/unit/kernels/test_interpreter.py` runs them in a process."""

import pytest
import torch

from megatron_rb.kernels.triton_runtime import interpreting


def pytest_collection_modifyitems(items):
    if not interpreting():
        skip = pytest.mark.skip(reason="runs in its own process with TRITON_INTERPRET=1, where triton is installed")
        for item in items:
            if "interpreter" in item.path.parts:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """New tensors are full of NaN, so that a value a kernel does not write cannot pass for a right one."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
