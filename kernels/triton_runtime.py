"""Whether Triton kernels can run here: the one place that looks for the optional package."""

from __future__ import annotations

from megatron_rb.platform.base import Platform, module_exists


def why_no_triton(platform: Platform) -> str | None:
    """None when Triton kernels run on this platform, else the reason; on CPU only Triton's interpreter can run them."""
    if not module_exists("triton"):
        return "triton is not installed"
    if platform.device_type == "cpu":
        return None if interpreting() else "on CPU only Triton's interpreter runs it (TRITON_INTERPRET=1)"
    return None if platform.offers("triton") else f"platform {platform.name} does not offer triton"


def interpreting() -> bool:
    """Whether kernels defined in this process run in Triton's interpreter."""
    if not module_exists("triton"):
        return False
    import triton  # optional, and slow to import

    # What `jit` makes tells; the record of it that Triton keeps is not in all releases (torch 2.7 comes with 3.3).
    return not isinstance(triton.jit(_empty_kernel), triton.JITFunction)


def _empty_kernel() -> None:
    pass
