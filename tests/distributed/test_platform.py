"""megatron-core on CPU processes gives what one process gives."""

import pytest

from tests.distributed.world import run_world


@pytest.fixture(scope="module")
def ranks():
    return run_world("tests.distributed.cases_platform:everything", world_size=2, timeout=240)


def test_sequence_parallel_mlp_has_the_loss_of_one_rank(ranks):
    for rank in ranks:
        case = rank["sequence_parallel"]
        assert case["loss"] == pytest.approx(case["reference"], abs=1e-6)


def test_rng_tracker_draws_differ_between_tensor_parallel_ranks(ranks):
    assert ranks[0]["sequence_parallel"]["draw"] != ranks[1]["sequence_parallel"]["draw"]


@pytest.mark.parametrize("schedule", ["pipeline", "interleaved"])
def test_pipeline_with_varying_lengths_has_the_gradients_of_one_process(ranks, schedule):
    assert max(rank[schedule]["grad_difference"] for rank in ranks) < 1e-6
    assert ranks[1][schedule]["losses"] == 4


def test_distributed_optimizer_with_overlap_and_clipping_follows_torch_adamw(ranks):
    for rank in ranks:
        assert rank["data_parallel"]["param_difference"] < 1e-6
        assert rank["data_parallel"]["norm_difference"] < 1e-6
