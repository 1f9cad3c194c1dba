"""What a rank knows of the grid it stands in."""

import pytest

from megatron_rb.layout.mesh import RankGrid
from megatron_rb.parallel.mesh import Mesh

GRID = RankGrid(tp_size=2, cp_size=2, dp_size=2, pp_size=2)
MESH = Mesh(GRID, rank=11)
"""Rank 11 stands at tp 1, cp 1, dp 0 of the second stage."""


def test_a_rank_is_called_by_its_coordinates():
    assert MESH.name == "rank 11 (tp 1, cp 1, pp 1, dp 0)"
    assert Mesh(RankGrid(tp_size=2, dp_size=2), rank=3).name == "rank 3 (tp 1, pp 0, dp 1)"


def test_ranks_that_hold_the_same_weights_are_counted_context_parallel_ones_first():
    assert [Mesh(GRID, rank).dp_cp_rank for rank in (9, 11, 13, 15)] == [0, 1, 2, 3]


def test_the_ends_of_a_pipeline_and_the_rank_that_answers_lie_in_the_same_copy():
    assert (MESH.first_pp_rank, MESH.last_pp_rank, MESH.answering_rank) == (3, 11, 10)


def test_a_mesh_that_only_describes_a_rank_has_no_groups():
    with pytest.raises(KeyError):
        _ = MESH.tp_group
