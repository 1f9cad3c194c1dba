"""The kernels compiled for NVIDIA architectures on a machine without a GPU."""

import dataclasses

import pytest

from megatron_rb.kernels.triton_runtime import interpreting
from megatron_rb.platform.base import module_exists

if not module_exists("triton"):
    pytest.skip("triton is not installed", allow_module_level=True)
if interpreting():
    pytest.skip("in the interpreter nothing is compiled", allow_module_level=True)

from megatron_rb.kernels.aot import assemblers as aot


@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
@pytest.mark.parametrize("kernel", aot.kernels(), ids=lambda kernel: kernel.name)
def test_machine_code(kernel, arch):
    if arch != 90 and not kernel.uses_tensor_cores:
        pytest.skip("registers and loads of the plain kernels are alike on all architectures")
    compiled = aot.compile_kernel(kernel, arch)
    assert 0 < compiled.registers <= 255
    assert compiled.spills <= aot.SPILL_BUDGET.get((kernel.name, arch), 0)
    assert compiled.shared_bytes <= aot.SHARED_LIMIT[arch]
    assert (compiled.tensor_core_instructions > 0) == kernel.uses_tensor_cores
    assert compiled.wide_loads_share >= aot.WIDE_LOADS_SHARE


def test_a_row_of_the_table_has_these_columns():
    columns = [field.name for field in dataclasses.fields(aot.Compiled)]
    assert columns == [
        "kernel",
        "arch",
        "registers",
        "spills",
        "shared_bytes",
        "tensor_core_instructions",
        "wide_loads_share",
    ]


def test_no_spills_are_allowed_on_sm_90():
    assert not [name for name, arch in aot.SPILL_BUDGET if arch == 90]
    assert {name for name, _ in aot.SPILL_BUDGET} <= {kernel.name for kernel in aot.kernels()}


def test_every_kernel_is_compiled_under_its_own_name():
    names = [kernel.name for kernel in aot.kernels()]
    assert len(set(names)) == len(names)
    assert {name.split("_")[0] for name in names} == {"mrope", "window", "rows"}
