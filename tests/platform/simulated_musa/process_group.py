"""The collective backend of the simulated device: gloo on the same memory."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves, tree_map

from tests.platform.simulated_musa.memory import device_type, is_simulated, on_host

COLLECTIVES = (
    "all_gather_single",
    "all_gather_single_coalesced",
    "all_to_all_single",
    "allgather",
    "allgather_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "alltoall",
    "alltoall_base",
    "barrier",
    "broadcast",
    "gather",
    "recv",
    "recv_anysource",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_single_coalesced",
    "scatter",
    "send",
    "_allgather_base",
    "_reduce_scatter_base",
    "_start_coalescing",
    "_end_coalescing",
    "monitored_barrier",
)
FIRST_ARCH = {torch.bfloat16: (2, 2), torch.float8_e4m3fn: (3, 1), torch.float8_e5m2: (3, 1)}
"""Architecture from which Moore Threads builds collectives of a type."""


class SimulatedBackend(dist.ProcessGroup):
    """torch takes a group written in Python for all devices of a backend string, so this one serves cpu tensors too."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        gloo = dist.ProcessGroupGloo(store, rank, size, timeout=timeout)
        self._host = dist.ProcessGroup(store, rank, size)
        self._host._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        self._host._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
        self._name = ""
        for device in ("cpu", device_type()):
            self._register_backend(torch.device(device), dist.ProcessGroup.BackendType.CUSTOM, gloo)

    def _set_group_name(self, name: str) -> None:
        self._name = name

    def getGroupName(self) -> str:
        return self._name

    group_name = property(getGroupName)

    def set_timeout(self, timeout: timedelta) -> None:
        self._host.set_timeout(timeout)

    def _run(self, collective: str, args: Any, kwargs: Any) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor) and is_simulated(value):
                _check_arch(collective, value)
        args, kwargs = tree_map(_host_view, (args, kwargs))
        return getattr(self._host, collective)(*args, **kwargs)


def _check_arch(collective: str, tensor: torch.Tensor) -> None:
    arch = torch.get_device_module().get_device_capability()
    needed = FIRST_ARCH.get(tensor.dtype, (0, 0))
    if arch < needed:
        raise RuntimeError(f"{collective} of {tensor.dtype} is not built for mp_{arch[0]}{arch[1]}")


def _host_view(value: Any) -> Any:
    return on_host(value) if isinstance(value, torch.Tensor) and is_simulated(value) else value


def _delegate(name: str):
    def call(self: SimulatedBackend, *args: Any, **kwargs: Any) -> Any:
        return self._run(name, args, kwargs)

    return call


for _name in COLLECTIVES:
    setattr(SimulatedBackend, _name, _delegate(_name))


def register_backend(name: str) -> None:
    """As vendors do, with the devices as a list: torch would take a string apart into letters."""
    dist.Backend.register_backend(name, SimulatedBackend, devices=[device_type()])
