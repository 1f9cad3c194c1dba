"""Moves a module to a device so that its parameters stay the same objects."""

from __future__ import annotations

import torch


def move_module(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Move parameters, their gradients and buffers in place; returns the module.

    Optimizers made before, weights tied to each other and attributes set on a parameter (megatron-core keeps
    `tensor_model_parallel` and the like there) stay as they are. `Module.to` does this only for device types that torch
    itself knows: for others it makes new parameters, without attributes and ties.

    Raises:
        RuntimeError: something else holds a parameter's memory, e.g. gradient hooks, on a device type torch does not
            know; move the module before wrapping it.
    """
    with torch.no_grad():
        for parameter in module.parameters():
            _move_parameter(parameter, device)
        buffers = {id(buffer): (buffer, buffer.to(device)) for buffer in module.buffers()}
        for owner in module.modules():
            for name, buffer in owner.named_buffers(recurse=False, remove_duplicate=False):
                owner._buffers[name] = buffers[id(buffer)][1]
    return module


def _move_parameter(parameter: torch.nn.Parameter, device: torch.device) -> None:
    if parameter.device == device:
        return
    grad = None if parameter.grad is None else parameter.grad.to(device)
    value = parameter.detach().to(device)
    parameter.grad = None
    if torch._has_compatible_shallow_copy_type(parameter, value):
        parameter.data = value
    else:
        new = type(parameter)(value, requires_grad=parameter.requires_grad)
        new.__dict__.update(parameter.__dict__)
        torch.utils.swap_tensors(parameter, new)
    parameter.grad = grad
