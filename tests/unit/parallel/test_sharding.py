"""Cutting parameters over tensor-parallel ranks, putting them together, and storing them for any degree."""

import pytest
import torch

from megatron_rb.platform import get_platform
from megatron_rb.platform.mcore_shims import install_mcore_shims

install_mcore_shims(get_platform("cpu"))

from megatron_rb.parallel.sharding import (  # noqa: E402
    ShardSpec,
    full_to_local,
    local_to_full,
    stored_shape,
    stored_to_full,
)
from tests.distributed.world import run_world  # noqa: E402

SPECS = [
    ShardSpec((5,)),
    ShardSpec((6, 3), dim=0),
    ShardSpec((3, 53), dim=1),
    ShardSpec((1, 3), dim=0),
    ShardSpec((2 * 53, 3), dim=0, stride=2),
    ShardSpec((3, 2 * 6), dim=1, stride=2),
]


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_joined_shards_are_the_full_tensor(spec: ShardSpec, tp_size: int):
    full = torch.randn(spec.full_shape)
    shards = [full_to_local(full, spec, rank, tp_size) for rank in range(tp_size)]
    assert {tuple(shard.shape) for shard in shards} == {spec.local_shape(tp_size)}
    assert torch.equal(local_to_full(shards, spec), full)


def test_fused_parts_are_cut_one_by_one():
    full = torch.arange(8)
    assert full_to_local(full, ShardSpec((8,), dim=0, stride=2), 1, 2).tolist() == [2, 3, 6, 7]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_stored_form_leads_back_to_the_full_tensor(spec: ShardSpec):
    full = torch.randn(spec.full_shape)
    stored = full if spec.stride == 1 else torch.stack(full.chunk(spec.stride, dim=spec.dim))
    assert tuple(stored.shape) == stored_shape(spec)
    assert torch.equal(stored_to_full(stored, spec), full)


def test_tensor_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"shape \(4,\) was given where the model has \(6,\)"):
        full_to_local(torch.zeros(4), ShardSpec((6,), dim=0), 0, 2)


def test_weights_and_optimizer_open_under_another_degree(tmp_path):
    results = run_world("tests.distributed.cases_sharding:reshard_all", 2, timeout=300, folder=str(tmp_path))
    for differing in results:
        assert len(differing) == 4
        assert {name: keys for name, keys in differing.items() if keys} == {}
