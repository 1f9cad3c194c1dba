"""megatron-core may only be imported after the shims, whichever test a process happens to begin with."""

import pytest

from megatron_rb.platform import get_platform
from megatron_rb.platform.mcore_shims import install_mcore_shims

install_mcore_shims(get_platform("cpu"))


@pytest.fixture(scope="module")
def lone_mesh():
    """The mesh of a world that is this process alone; it ends with the module."""
    # Imported here because most modules of tests need neither.
    import torch.distributed as dist

    from megatron_rb.layout.mesh import RankGrid
    from megatron_rb.parallel.groups import build_mesh, destroy_groups

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield build_mesh(RankGrid(), 1, timeout_minutes=1, seed=0)
    destroy_groups()
    dist.destroy_process_group()
