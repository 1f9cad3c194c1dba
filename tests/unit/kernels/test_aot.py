"""The kernels compiled for NVIDIA architectures on a machine without a GPU."""

import pytest

from megatron_rb.kernels.triton_runtime import interpreting
from megatron_rb.platform.base import module_exists

if not module_exists("triton"):
    pytest.skip("triton is not installed", allow_module_level=True)
if interpreting():
    pytest.skip("in the interpreter nothing is compiled", allow_module_level=True)

from megatron_rb.kernels import aot

SPILLS = {80: 24, 90: 0, 100: 8}
"""Most loads and stores of spilled registers; none on sm_90, elsewhere what was recorded (16 and 4) and a margin."""
WIDE_LOADS = {"mrope": 0.65, "mrope_vision": 0.9, "window_80": 0.9, "window_64": 0.9, "window_72": 0.6, "rows": 0.5}
"""Least share of 16-byte loads, by the longest prefix of a kernel's name.

Below 0.9 stay: the tile of four key heads, which is too small for 128 threads; the partners of heads of 72, whose
halves begin at 72 bytes; and the index in front of each row, where it is one of two loads.
"""


@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
@pytest.mark.parametrize("kernel", aot.kernels(), ids=lambda kernel: kernel.name)
def test_machine_code(kernel, arch):
    if arch != 90 and not kernel.uses_tensor_cores:
        pytest.skip("registers and loads of the plain kernels are alike on all architectures")
    compiled = aot.compile_kernel(kernel, arch)
    assert 0 < compiled.registers <= 255
    assert compiled.spills <= SPILLS[arch]
    assert compiled.shared_bytes <= aot.SHARED_LIMIT[arch]
    assert (compiled.tensor_core_instructions > 0) == kernel.uses_tensor_cores
    floor = WIDE_LOADS[max((name for name in WIDE_LOADS if kernel.name.startswith(name)), key=len)]
    assert compiled.wide_loads_share >= floor


def test_every_kernel_is_compiled_under_its_own_name():
    names = [kernel.name for kernel in aot.kernels()]
    assert len(set(names)) == len(names)
    assert {name.split("_")[0] for name in names} == {"mrope", "window", "rows"}
