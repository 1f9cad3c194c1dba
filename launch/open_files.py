"""Open files and sockets: how many a process needs in a world of a given size.

Counted on gloo (torch 2.13): exact to the file with 4 processes, no more than this in a run of 64 (tests/distributed).
A gloo group holds 4 files, connected or not, and a socket to every other member. Where it connects lazily, it has a
socket to every member that it has exchanged something with: its neighbours in the ring of a sum, and those in the trees
of broadcasts and barriers, at most 2 log2(size) - 1 in all. The store of the world has a socket to every rank, in a
process of its own.
"""

from __future__ import annotations

import math

FILES_OF_A_GROUP, FILES_OF_THE_STORE = 4, 10
OTHER_FILES = 256
"""Kept for data, logs, libraries, devices and the accelerator's own connections, which are not counted here."""


AXES_OF_GROUPS = (
    *((), ("dp", "cp"), ("dp",), ("cp",), ("tp", "pp"), ("tp",), ("pp",)),
    *(("tp", "cp", "dp"), ("tp", "dp"), ("tp", "cp"), ("tp", "cp", "dp", "pp")),
)
"""Along which the groups of megatron-core's `parallel_state` go, those of experts among them."""


def group_sizes(world: int, tp: int, pp: int, cp: int) -> list[int]:
    """Sizes of the process groups that rank 0 is in: the world and those of megatron-core.

    Those of the same ranks, such as along axes of size 1, are one (`parallel.groups`).
    """
    size = {"tp": tp, "cp": cp, "dp": world // (tp * pp * cp), "pp": pp}
    different = {frozenset(axis for axis in axes if size[axis] > 1) for axes in AXES_OF_GROUPS}
    first_and_last_stage = [2] if pp > 2 else []
    return [world, *(math.prod(size[axis] for axis in axes) for axes in different), *first_and_last_stage]


def gloo_sizes_on_devices(world: int, tp: int, pp: int, cp: int) -> list[int]:
    """Sizes of the groups with a gloo part that a rank is in where devices have a backend of their own.

    Those are the world and the ranks that have the same samples; the groups of the model are the device's alone.
    """
    return [world, tp * pp * cp]


def files_of_groups(sizes: list[int], lazy: bool) -> int:
    """Files of the gloo groups of these sizes, after a collective in each of them.

    Args:
        lazy: whether gloo connects two ranks only when they exchange something.
    """
    peers = (min(_peers_of_trees(size) if lazy else size - 1, size - 1) for size in sizes)
    return FILES_OF_A_GROUP * len(sizes) + sum(peers)


def _peers_of_trees(size: int) -> int:
    return max(2, 2 * math.ceil(math.log2(size)) - 1)


def files_of_rank(world: int, tp: int, pp: int, cp: int, lazy: bool, devices: bool = False) -> int:
    """Most files that a rank has open in training.

    Args:
        devices: whether ranks compute on devices with a backend of their own.
    """
    on_host = [*group_sizes(world, tp, pp, cp), tp * pp * cp]  # the last one: ranks that have the same samples
    sizes = gloo_sizes_on_devices(world, tp, pp, cp) if devices else on_host
    return OTHER_FILES + 1 + files_of_groups(sizes, lazy)


def files_of_store(world: int) -> int:
    """Files of the process that keeps the store of a world."""
    return FILES_OF_THE_STORE + world
