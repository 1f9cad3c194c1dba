"""Opens sessions: the one way from a config into a world; megatron-core is adapted to the platform on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_rb.config.derive import check_tp_size, replica_size, written_layout
from megatron_rb.config.schema import Config
from megatron_rb.layout.mesh import RankGrid
from megatron_rb.parallel.session import Session
from megatron_rb.parallel.world import (
    connect_devices,
    cpu_threads_of_rank,
    start_process_group,
    world_from_environment,
)
from megatron_rb.platform import Platform, get_platform
from megatron_rb.platform.dtypes import DTYPES
from megatron_rb.platform.mcore_shims import install_mcore_shims
from megatron_rb.shapes.balance import default_layout
from megatron_rb.shapes.shape import RoboBrainShape, load_shape


def adapt_megatron(name: str) -> Platform:
    """The platform of this name (`platform.name`), with megatron-core adapted to it.

    Called before a module is imported that imports megatron-core, which compiles functions at its import.
    """
    platform = get_platform(name)
    install_mcore_shims(platform)
    return platform


def open_session(config: Config, shape: RoboBrainShape | None = None) -> Session:
    """Join the world of the environment, once per process, and build the groups of a config in it.

    Args:
        shape: of a model without a folder; None = that of `model.hf_path`.

    Raises:
        ValueError: model, degrees, processes or device do not fit together.
    """
    platform = adapt_megatron(config.platform.name)
    from megatron_rb.parallel.groups import build_mesh  # imports megatron-core

    shape = shape or load_shape(config.model.hf_path)
    parallel, world_size = config.parallel, world_from_environment()[2]
    check_tp_size(parallel.tp_size, shape)
    replica_size(parallel)
    grid = RankGrid.of_world(world_size, parallel.tp_size, parallel.pp_size, parallel.cp_size)
    layout = written_layout(parallel, shape) or default_layout(shape, parallel.pp_size)
    _join(config, platform)
    mesh = build_mesh(grid, layout.vpp_size, parallel.timeout_minutes, config.seed, platform.device_backend)
    return Session(platform, mesh, shape, layout, platform.current_device())


@contextmanager
def session_of(config: Config, shape: RoboBrainShape | None = None) -> Iterator[Session]:
    """An open session for a block, after which another can be opened in the same world; every rank enters it."""
    session = open_session(config, shape)
    yield session
    # Not after an error: the other ranks would be waited for.
    from megatron_rb.parallel.groups import destroy_groups

    destroy_groups()


def _join(config: Config, platform: Platform) -> None:
    torch.set_num_threads(cpu_threads_of_rank(config.platform.threads_per_rank))
    platform.set_device(world_from_environment()[1])
    platform.require(DTYPES[config.model.dtype], "compute", "collective")
    platform.allow_tf32(config.platform.tf32)
    start_process_group(platform, config.parallel.timeout_minutes)
    connect_devices(platform)
