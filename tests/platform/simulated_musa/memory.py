"""Real device tensors on host memory: a DLPack capsule of a CPU tensor with its device field changed, and back.

DLPack's "extension device" is torch's PrivateUse1. Both tensors share the memory; the device's has a storage, strides
and views of its own, so autograd, in-place work and `torch.save` see what they see on an accelerator.
"""

from __future__ import annotations

import ctypes

import torch
from torch.utils.dlpack import DLDeviceType

_TENSOR_CAPSULE = b"dltensor"


class _Device(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("index", ctypes.c_int32)]


class _Tensor(ctypes.Structure):
    """The head of DLPack's DLManagedTensor."""

    _fields_ = [("data", ctypes.c_void_p), ("device", _Device)]


_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype, _pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def is_simulated(thing: torch.Tensor | torch.device | torch.UntypedStorage) -> bool:
    """Whether a device, or the device of a tensor or storage, is the simulated one."""
    device = thing if isinstance(thing, torch.device) else thing.device
    return device.type == device_type()


def device_type() -> str:
    """The name that `install` gave the device."""
    return torch._C._get_privateuse1_backend_name()


def on_device(tensor: torch.Tensor, index: int) -> torch.Tensor:
    """The memory of a CPU tensor as a tensor of the device."""
    return _shared(tensor, DLDeviceType.kDLExtDev, index)


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a device tensor as a CPU tensor."""
    return _shared(tensor, DLDeviceType.kDLCPU, 0)


def _shared(tensor: torch.Tensor, kind: DLDeviceType, index: int) -> torch.Tensor:
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    capsule = torch._C._to_dlpack(tensor.detach())
    managed = _Tensor.from_address(_pointer_of(capsule, _TENSOR_CAPSULE))
    managed.device.type, managed.device.index = kind, index
    return torch._C._from_dlpack(capsule)
