"""Process groups of a mesh in a world of one; several ranks are in tests/distributed."""

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_rb.layout.mesh import RankGrid
from megatron_rb.parallel import groups
from megatron_rb.parallel.groups import build_mesh, destroy_groups, pipeline_pair_group, replica_group_gloo
from megatron_rb.parallel.mesh import Mesh


@pytest.fixture
def world():
    """A world of this process alone, without a mesh."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("world")
def test_every_group_of_a_lone_rank_is_that_rank_and_can_be_built_again():
    for _ in range(2):
        mesh = build_mesh(RankGrid(), 1, timeout_minutes=0.2, seed=0)
        found = [mesh.tp_group, mesh.cp_group, mesh.pp_group, mesh.dp_cp_group]
        assert [dist.get_process_group_ranks(group) for group in found] == [[0]] * 4
        assert len({id(group) for group in found}) == 1  # the same ranks
        assert len(dist.distributed_c10d._world.pg_map) == 2  # that one, and the world
        destroy_groups()
        assert list(dist.distributed_c10d._world.pg_map) == [dist.group.WORLD]


@pytest.mark.usefixtures("world")
def test_groups_for_the_device_have_its_backend_alone_and_the_world_can_be_left_and_made_again():
    for _ in range(2):
        mesh = build_mesh(RankGrid(), 1, timeout_minutes=0.2, seed=0, device_backend="cpu:gloo")
        assert {str(dist.get_backend(group)) for group in mesh.groups.values()} == {"cpu:gloo"}
        assert mesh.tp_group is mesh.dp_cp_group  # the same ranks
        with pytest.raises(AssertionError, match="not initialized"):  # a gloo copy of it, which nobody uses
            parallel_state.get_data_parallel_group_gloo(with_context_parallel=True)
        destroy_groups()
        assert list(dist.distributed_c10d._world.pg_map) == [dist.group.WORLD]


@pytest.mark.usefixtures("world")
def test_other_groups_are_made_as_before_when_those_of_a_mesh_fail(monkeypatch):
    def refuse(**_):
        raise RuntimeError("no groups today")

    make = dist.new_group
    monkeypatch.setattr(parallel_state, "initialize_model_parallel", refuse)
    with pytest.raises(RuntimeError, match="today"):
        build_mesh(RankGrid(), 1, timeout_minutes=0.2, seed=0, device_backend="cpu:gloo")
    assert dist.new_group is make


@pytest.mark.usefixtures("world")
def test_ranks_with_the_same_samples_have_a_group_on_the_host():
    group = replica_group_gloo(Mesh(RankGrid()))
    assert dist.get_process_group_ranks(group) == [0] and dist.get_backend(group) == "gloo"


@pytest.fixture
def made(monkeypatch):
    """The ranks of every group that is made, in order, without a world."""
    made: list[list[int]] = []
    monkeypatch.setattr(groups.dist, "new_group", lambda ranks, backend=None: made.append(ranks) or tuple(ranks))
    monkeypatch.setattr(groups.dist, "get_rank", lambda: made_for[0])
    made_for = [0]
    return made, made_for


GRID = RankGrid(tp_size=2, dp_size=2, pp_size=3)


@pytest.mark.parametrize("rank", [0, 1, 6, 11])
def test_all_ranks_make_all_groups_in_the_same_order_and_keep_their_own(made, rank):
    """A rank that leaves one out, or makes them in another order, hangs the world."""
    (calls, rank_of), mesh = made, Mesh(GRID, rank)
    rank_of[0] = rank
    mine = replica_group_gloo(mesh)
    assert calls == [list(ranks) for ranks in GRID.groups("tp", "cp", "pp")] and rank in mine


@pytest.mark.parametrize(("rank", "stage"), [(0, 0), (5, 1), (11, 2)])
def test_two_stages_of_every_pipeline_have_a_group_that_the_stage_between_is_not_in(made, rank, stage):
    (calls, rank_of), mesh = made, Mesh(GRID, rank)
    rank_of[0] = rank
    assert mesh.pp_rank == stage
    mine = pipeline_pair_group(mesh, 0, 2)
    assert calls == [[ranks[0], ranks[2]] for ranks in GRID.groups("pp")] and len(calls) == 4
    assert mine is None if stage == 1 else rank in mine


def test_one_stage_is_no_pair_and_makes_no_group(made):
    assert pipeline_pair_group(Mesh(GRID, 0), 1, 1) is None and made[0] == []
