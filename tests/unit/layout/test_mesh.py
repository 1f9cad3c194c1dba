"""The rank grid: one formula, both ways, and the groups that follow from it."""

import pytest

from megatron_rb.layout.mesh import AXES, RankCoordinates, RankGrid

GRID = RankGrid(tp_size=2, cp_size=3, dp_size=2, pp_size=2)


def test_ranks_count_tensor_then_context_then_data_then_pipeline_parallel():
    assert [GRID.coordinates(rank) for rank in (1, 2, 6, 12)] == [
        RankCoordinates(1, 0, 0, 0),
        RankCoordinates(0, 1, 0, 0),
        RankCoordinates(0, 0, 1, 0),
        RankCoordinates(0, 0, 0, 1),
    ]


def test_every_rank_is_found_again_at_its_coordinates():
    ranks = range(GRID.world_size)
    assert [GRID.rank(GRID.coordinates(rank)) for rank in ranks] == list(ranks)


@pytest.mark.parametrize("axes", [(axis,) for axis in AXES] + [("cp", "dp"), ("tp", "cp", "pp")])
def test_groups_over_axes_hold_every_rank_once(axes: tuple[str, ...]):
    groups = GRID.groups(*axes)
    assert sorted(rank for group in groups for rank in group) == list(range(GRID.world_size))
    assert len({len(group) for group in groups}) == 1


def test_group_over_axes_differs_on_these_axes_alone():
    assert GRID.group(13, "pp") == (1, 13)
    assert GRID.group(13, "cp", "dp") == (13, 15, 17, 19, 21, 23)


def test_what_the_degrees_leave_over_is_data_parallel():
    assert RankGrid.of_world(24, tp_size=2, pp_size=2, cp_size=3) == GRID


def test_world_that_the_degrees_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="6 processes cannot be split into tp_size 2 x pp_size 2 x cp_size 1; start a"):
        RankGrid.of_world(6, tp_size=2, pp_size=2)
