"""The boxes of all ranks' runs are the stored tensor: nothing twice, nothing left out, no padding."""

import pytest
import torch

from megatron_rb.checkpoint.runs import TensorRun, clear_padding, is_written, pieces_of, runs_of_rank, shared_runs
from megatron_rb.layout.mesh import RankGrid
from megatron_rb.parallel.boxes import cut_evenly
from megatron_rb.parallel.mesh import Mesh
from megatron_rb.parallel.sharding import Sharded, ShardSpec, full_to_local, sharded_tensor, stored_shape

SPECS = [
    ShardSpec((7,)),
    ShardSpec((6, 3), dim=0),
    ShardSpec((3, 53), dim=1),
    ShardSpec((4, 3, 5), dim=1),
    ShardSpec((1, 3), dim=0),
    ShardSpec((2 * 6, 5), dim=0, stride=2),
    ShardSpec((2 * 53, 3), dim=0, stride=2),
    ShardSpec((3, 2 * 7), dim=1, stride=2),
    ShardSpec((2 * 53,), dim=0, stride=2),
]


def stored_form(full: torch.Tensor, spec: ShardSpec) -> torch.Tensor:
    return full if spec.stride == 1 else torch.stack(full.chunk(spec.stride, dim=spec.dim))


@pytest.mark.parametrize("dp_size", [1, 2, 5])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_written_pieces_of_all_ranks_are_the_stored_tensor_once(spec: ShardSpec, tp_size: int, dp_size: int):
    full = torch.arange(torch.Size(spec.full_shape).numel()).reshape(spec.full_shape) + 1
    found = torch.zeros(stored_shape(spec), dtype=full.dtype)
    for tp_rank in range(tp_size):
        local = full_to_local(full, spec, tp_rank, tp_size)
        sharded = sharded_tensor("key", local, spec, tp_rank, tp_size, dp_rank=0)
        for cut in cut_evenly([local.numel()], dp_size) if is_written(sharded) else ():
            for piece in pieces_of(TensorRun(sharded, cut.first, local.reshape(-1)[cut.first : cut.stop])):
                assert piece.global_shape == stored_shape(spec)
                found[piece.global_slice()] += piece.data
    assert torch.equal(found, stored_form(full, spec))


def test_pieces_are_views_of_the_values():
    values = torch.arange(6.0)
    sharded = sharded_tensor("key", values.view(2, 3), ShardSpec((2, 3), dim=0), 0, 1, dp_rank=0)
    for piece in pieces_of(TensorRun(sharded, 1, values[1:])):
        piece.data.fill_(9.0)
    assert values.tolist() == [0.0, 9.0, 9.0, 9.0, 9.0, 9.0]


@pytest.mark.parametrize(("spec", "tp_size", "left"), [(SPECS[1], 2, 1.0), (SPECS[2], 2, 0.0)], ids=["even", "padded"])
def test_only_a_tensor_with_padding_is_cleared(spec, tp_size, left):
    local = torch.ones(spec.local_shape(tp_size))
    run = TensorRun(sharded_tensor("key", local, spec, 1, tp_size, dp_rank=0), 0, local.view(-1))
    clear_padding(run)
    assert local.unique().tolist() == [left]


@pytest.mark.parametrize(("copy", "tp_rank", "written"), [(0, 0, True), (1, 0, False), (0, 1, False)])
def test_copies_of_other_ranks_are_not_written(copy, tp_rank, written):
    sharded = sharded_tensor("key", torch.ones(3), ShardSpec((3,)), tp_rank, 2, dp_rank=1, copy=copy)
    assert is_written(sharded) == written


def test_ranks_with_the_same_weights_share_them_evenly():
    tensors = [sharded_tensor(name, torch.ones(5, 2), ShardSpec((5, 2)), 0, 1, dp_rank=0) for name in "ab"]
    assert shares_of(tensors, 4) == [[("a", 0, 5)], [("a", 5, 5)], [("b", 0, 5)], [("b", 5, 5)]]


def test_shares_are_even_in_bytes_and_whole_in_elements():
    one, other = torch.ones(3, dtype=torch.bfloat16), torch.ones(3)
    tensors = [sharded_tensor(name, data, ShardSpec((3,)), 0, 1, 0) for name, data in (("a", one), ("b", other))]
    assert shares_of(tensors, 2) == [[("a", 0, 3)], [("b", 0, 3)]]
    assert shares_of(tensors, 3) == [[("a", 0, 3)], [("b", 0, 1)], [("b", 1, 2)]]


def shares_of(tensors: list[Sharded], dp_size: int) -> list[list[tuple[str, int, int]]]:
    """`(key, first element, elements)` of the runs of each data-parallel rank."""
    shares = []
    for rank in range(dp_size):
        mesh = Mesh(RankGrid.of_world(dp_size, 1), rank, groups={"dp_cp": None})
        runs = runs_of_rank(shared_runs(tensors, mesh), mesh)
        shares.append([(run.sharded.key, run.first, run.values.numel()) for run in runs])
    return shares
