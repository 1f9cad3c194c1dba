"""A Moore Threads device for tests: `torch` with a real `musa` device type on host memory.

What passes here passes on tensors that are neither on cpu nor on cuda, with a device generator, a device index, a
collective backend and storage tags of their own. What this proves nothing about: Moore Threads' kernels and their
rounding, MCCL, streams and the hazards of asynchronous work, memory, speed, and what torch_musa changes in torch.
Gradients can be computed on the first device alone, since torch makes no more threads for it.
A process that has called `install` keeps the device until it ends, so tests do it in processes of their own.
"""

from __future__ import annotations

import sys
import types
from importlib.machinery import ModuleSpec

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from tests.platform.simulated_musa.kernels import Kernels
from tests.platform.simulated_musa.process_group import register_backend
from tests.platform.simulated_musa.runtime import Runtime
from tests.platform.simulated_musa.storages import teach_storages

__all__ = ["install", "install_named", "install_npu"]

BACKENDS = {"musa": "mccl", "npu": "hccl"}
"""Collective backend that belongs to a device type."""


def install(devices: int = 2) -> None:
    """Give this process `devices` musa devices, as if torch_musa were installed; once per process."""
    torch.version.musa = "simulated"  # type: ignore[attr-defined]
    vendor = types.ModuleType("torch_musa")
    vendor.__spec__ = ModuleSpec("torch_musa", None)
    sys.modules["torch_musa"] = vendor
    _install_device("musa", devices)


def install_npu() -> None:
    """As `install`, for the device of examples/npu_platform."""
    install_named("npu")


def install_named(name: str, devices: int = 2) -> None:
    """As `install`, for `musa` or for a device type whose platform is a plug-in."""
    if name == "musa":
        install(devices)
    else:
        _install_device(name, devices)


def _install_device(name: str, devices: int) -> None:
    runtime = Runtime(name, devices)
    _setup_privateuseone_for_python_backend(name, runtime)
    runtime.kernels = Kernels(runtime.current_device, runtime.next_seed)
    teach_storages()
    # Page-locked memory belongs to a driver; here all memory is the host's, and a copy stands for it.
    torch.Tensor.pin_memory = lambda tensor, device=None: tensor.clone()  # type: ignore[method-assign]
    register_backend(BACKENDS[name])
