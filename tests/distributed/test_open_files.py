"""The files that ranks hold are those that `rb doctor` counts with, and every rank may open as many as it can."""

import pytest

from megatron_rb.launch.open_files import files_of_groups, group_sizes
from tests.distributed.world import run_world

WORLD = 4
LAYOUTS = [(2, 2, 1), (1, 2, 2), (1, 1, 1)]


@pytest.fixture(scope="module", params=[False, True], ids=["at once", "lazily"])
def ranks(request):
    arguments = {"layouts": LAYOUTS[:1] if request.param else LAYOUTS, "lazy": request.param, "soft_limit": 200}
    case = "tests.distributed.cases_open_files:open_files"
    return request.param, run_world(case, WORLD, timeout=100, **arguments)


def test_rank_zero_is_in_the_groups_that_are_counted(ranks):
    sizes = [found for found, _ in ranks[1][0]["found"]]
    assert sizes == [sorted(group_sizes(WORLD, *layout)) for layout in LAYOUTS[: len(sizes)]]


def test_groups_hold_the_files_that_are_counted(ranks):
    lazy, (zero, *_, last) = ranks
    for sizes, files in (zero["found"][0], last["found"][0]):
        assert files == 1 + files_of_groups(sizes, lazy)  # its socket to the store


def test_the_limit_of_every_rank_is_the_highest_it_may_have(ranks):
    assert [soft == hard > 200 for soft, hard in (rank["limit"] for rank in ranks[1])] == [True] * WORLD
