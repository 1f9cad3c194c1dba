"""A Moore Threads device for tests: `torch` with a real `musa` device type on host memory.

What passes here passes on tensors that are neither on cpu nor on cuda, with a device generator, a device index, a
collective backend and storage tags of their own. What this proves nothing about: Moore Threads' kernels and their
rounding, MCCL, streams and the hazards of asynchronous work, memory, speed, and what torch_musa changes in torch.
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

__all__ = ["install", "install_device"]


def install(devices: int = 2, arch: tuple[int, int] = (2, 2)) -> None:
    """Give this process `devices` musa devices of an architecture, as if torch_musa were installed; once per process.

    Args:
        arch: (2, 1) = S80, (2, 2) = S4000, (3, 1) = S5000.
    """
    torch.version.musa = "simulated"  # type: ignore[attr-defined]
    vendor = types.ModuleType("torch_musa")
    vendor.__spec__ = ModuleSpec("torch_musa", None)
    sys.modules["torch_musa"] = vendor
    install_device("musa", "mccl", devices, arch)


def install_device(name: str, backend: str, devices: int, arch: tuple[int, int] = (2, 2)) -> None:
    """Give this process a device type with a collective backend of its own; once per process."""
    runtime = Runtime(name, devices, arch)
    _setup_privateuseone_for_python_backend(name, runtime)
    runtime.kernels = Kernels(runtime.current_device, runtime.next_seed)
    teach_storages()
    register_backend(backend)
