"""A vocabulary shared by two ranks gives the loss and the gradients of one rank."""

import pytest

from tests.distributed.world import run_world


def test_two_ranks_give_what_one_gives():
    for results in run_world("tests.distributed.cases_kernels:shared_vocabulary", world_size=2, timeout=120):
        assert [case["rows"] for case in results] == [11, 3, 1]
        for case in results:
            assert case["loss"] == pytest.approx(0, abs=1e-4)
            assert max(case["d_hidden"], case["d_weight"]) < 2e-6
