"""Which ranks stand for all."""

import pytest

from megatron_rb.layout.mesh import RankGrid
from megatron_rb.rehearsal.ranks import classes, ranks_asked

GRID = RankGrid(tp_size=4, pp_size=4, dp_size=64)


def test_classes_are_the_first_and_the_last_copy_of_every_coordinate():
    ranks = classes(GRID)
    at = [GRID.coordinates(rank) for rank in ranks]
    assert len(ranks) == 32 and {(c.tp, c.pp, c.dp) for c in at} == {
        (tp, pp, dp) for tp in range(4) for pp in range(4) for dp in (0, 63)
    }


def test_one_copy_is_rehearsed_once():
    assert classes(RankGrid(tp_size=2, pp_size=2)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("text", "ranks"), [("0,256", [0, 256]), ("2-4, 1", [1, 2, 3, 4]), ("all", list(range(1024))), ("7,7", [7])]
)
def test_ranks_are_named_by_number_and_range(text, ranks):
    assert ranks_asked(text, GRID) == ranks


@pytest.mark.parametrize("text", ["", "a", "1;2", "-1", "0,", "5-3", "0,5-3"])
def test_what_is_no_rank_is_one_sentence(text):
    with pytest.raises(ValueError, match="--ranks '.*' is not understood; write all, classes, or numbers"):
        ranks_asked(text, GRID)


def test_a_rank_beyond_the_run_is_named():
    with pytest.raises(ValueError, match="--ranks names rank 1024; the run has the ranks 0 to 1023"):
        ranks_asked("0,1024", GRID)


@pytest.mark.timeout(10)
def test_a_range_beyond_the_run_is_named_without_counting_through_it():
    with pytest.raises(ValueError, match="--ranks names rank 99999999999; the run has the ranks 0 to 1023"):
        ranks_asked("0-99999999999", GRID)
