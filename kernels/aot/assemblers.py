"""Compiles the Triton kernels for NVIDIA architectures without a GPU, and counts what the machine code is made of."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_rb.kernels.dynamic_padding import triton_impl as rows
from megatron_rb.kernels.mrope import triton_impl as mrope
from megatron_rb.kernels.window_attention import triton_impl as window

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory one block may have."""
SPILL_BUDGET = {
    ("window_80", 80): 4,
    ("window_80_backward", 80): 16,
    ("window_80_backward", 100): 8,
    ("window_72", 80): 12,
    ("window_72_backward", 80): 48,
    ("window_72_backward", 100): 80,
}
"""Most loads and stores of spilled registers, by kernel and architecture; none where nothing is said.

What was counted (2, 12, 4; 8, 39, 70) and a margin for other releases of the assembler. No published model has windows
with heads of 72: it is there for those that will.
"""
WIDE_LOADS_SHARE = 0.9
"""Least share of global loads that are 16 bytes wide."""


@dataclass(frozen=True)
class Kernel:
    """One kernel with the sizes of a published model."""

    name: str
    function: Any
    signature: Mapping[str, str]
    """Type of every run-time argument, as Triton writes it."""
    constants: Mapping[str, Any]
    uses_tensor_cores: bool = False
    unaligned: tuple[str, ...] = ()
    """Integer arguments that are not a multiple of 16."""
    warps: int = 4


@dataclass(frozen=True)
class Compiled:
    """Counts from the machine code of a kernel for one architecture."""

    kernel: str
    arch: int
    registers: int
    spills: int
    """Loads and stores of local memory."""
    shared_bytes: int
    tensor_core_instructions: int
    wide_loads_share: float
    """Global loads of 16 bytes per thread, as a share of all."""


def kernels() -> list[Kernel]:
    """What is compiled: bf16, sizes of RoboBrain 2.0 7B (head 80) and 2.5 8B (heads of 128, ViT 72)."""
    return [*_rotations(), *_windows(), *_rows()]


def _rotations() -> Iterator[Kernel]:
    sizes = {
        "text": dict(Q_HEADS=28, K_HEADS=4, BLOCK=32, HALF=64, BLOCK_HALF=64),
        "vision": dict(Q_HEADS=16, K_HEADS=16, BLOCK=32, HALF=40, BLOCK_HALF=64),
        "qk_norm": dict(Q_HEADS=32, K_HEADS=8, BLOCK=64, HALF=64, BLOCK_HALF=64),
    }
    pointers = {"q": "*bf16", "k": "*bf16", "q_out": "*bf16", "k_out": "*bf16", "cos": "*fp32", "sin": "*fp32"}
    strides = dict.fromkeys(("q_token", "q_head", "k_token", "k_head"), "i32")
    for name, constants in sizes.items():
        norm = name == "qk_norm"
        weight = "*bf16" if norm else "*fp32"
        signature = {**pointers, "q_weight": weight, "k_weight": weight, **strides, "eps": "fp32"}
        flags = {"DIRECTION": 1, "LIKE_HF": False, "NORM": norm}
        yield Kernel(f"mrope_{name}", mrope._rotate_kernel, signature, {**constants, **flags})
    whole = {**mrope.whole_sizes(16, 16, 36), "DIRECTION": 1, "LIKE_HF": False}
    yield Kernel("mrope_vision_72", mrope._rotate_whole_kernel, {**pointers, **strides}, whole, warps=mrope.WHOLE_WARPS)
    tensors = ("q", "k", "q_grad", "k_grad", "dq", "dk")
    gradient_strides = dict.fromkeys(("q_grad_token", "q_grad_head", "k_grad_token", "k_grad_head"), "i32")
    signature = {
        **dict.fromkeys(tensors, "*bf16"),
        "partial": "*fp32",
        "cos": "*fp32",
        "sin": "*fp32",
        "q_weight": "*bf16",
        "k_weight": "*bf16",
        **strides,
        **gradient_strides,
        "tokens": "i32",
        "eps": "fp32",
    }
    yield Kernel(
        "mrope_qk_norm_backward",
        mrope._norm_backward_kernel,
        signature,
        sizes["qk_norm"],
        unaligned=("tokens",),
        warps=mrope.BACKWARD_WARPS,
    )


def _windows() -> Iterator[Kernel]:
    tail = {
        "cos": "*fp32",
        "sin": "*fp32",
        "borders": "*i32",
        "row_stride": "i32",
        "part_stride": "i32",
        "head_stride": "i32",
        "scale": "fp32",
    }
    for head_dim in (80, 72, 64):
        constants = window.launch_sizes(head_dim, 16, 64)
        forward = {"qkv": "*bf16", "out": "*bf16", **tail}
        backward = {"qkv": "*bf16", "grad": "*bf16", "dqkv": "*bf16", **tail}
        odd = ("row_stride", "head_stride", "part_stride")
        yield Kernel(f"window_{head_dim}", window._forward_kernel, forward, constants, True, odd)
        yield Kernel(f"window_{head_dim}_backward", window._backward_kernel, backward, constants, True, odd)


def _rows() -> Iterator[Kernel]:
    for suffix, dtype, itemsize in (("", "*bf16", 2), ("_fp32", "*fp32", 4)):
        signature = {"source": dtype, "base": dtype, "out": dtype, "index": "*i32", "width": "i32"}
        for mode, number in rows.MODES.items():
            constants = {"MODE": number, "BLOCK": rows.BLOCK_BYTES // itemsize}
            yield Kernel(f"rows_{mode}{suffix}", rows._rows_kernel, signature, constants, warps=rows.WARPS)


def compile_kernel(kernel: Kernel, arch: int) -> Compiled:
    """Compile for compute capability `arch / 10`; needs neither a GPU nor a driver."""
    names = kernel.function.arg_names
    types = {name: kernel.signature.get(name, "constexpr") for name in names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if types[name].startswith("*") or (types[name] == "i32" and name not in kernel.unaligned)
    }
    source = ASTSource(kernel.function, types, dict(kernel.constants), aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": kernel.warps})
    return _count(kernel.name, arch, compiled.asm["cubin"], compiled.metadata.shared)


def _count(name: str, arch: int, cubin: bytes, shared_bytes: int) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _tool("cuobjdump", "--dump-resource-usage", str(path))
        code = _tool("nvdisasm", "-c", str(path))
    loads = re.findall(r"\bLDG(\.[\w.]+)?", code) + re.findall(r"\bLDGSTS(\.[\w.]+)?", code)
    wide = sum(".128" in suffix for suffix in loads)
    return Compiled(
        kernel=name,
        arch=arch,
        registers=_field(usage, "REG"),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared_bytes=shared_bytes,
        tensor_core_instructions=len(re.findall(r"\b(?:HGMMA|HMMA|UTCHMMA|UTCQMMA)\b", code)),
        wide_loads_share=wide / len(loads) if loads else 1.0,
    )


def _field(usage: str, name: str) -> int:
    found = re.search(rf"\b{name}:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump does not report {name}:\n{usage}")
    return int(found.group(1))


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], check=True, capture_output=True, text=True).stdout
