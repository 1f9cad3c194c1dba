"""Sums over the world at the end of a step."""

import math

import pytest
import torch

from megatron_rb.layout.mesh import RankGrid
from megatron_rb.models.work import Work, work_of
from megatron_rb.parallel.mesh import Mesh
from megatron_rb.train.totals import StepTotals, sum_over_world

RESULTS = [
    {"loss_sum": torch.tensor(6.0), "num_labels": torch.tensor(4.0)},
    {"loss_sum": torch.tensor(3.0), "num_labels": torch.tensor(2.0)},
]


def test_losses_labels_and_work_of_all_micro_batches_are_summed(lone_mesh, batches):
    totals = sum_over_world(RESULTS, batches, lone_mesh, stop_requested=False)
    assert (totals.loss_sum, totals.num_labels, totals.loss) == (9.0, 6, 1.5)
    assert totals.work == sum((work_of(batch) for batch in batches), Work()) and totals.work.samples == 4
    assert totals.sound and not totals.stop_requested


@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("finite", [True, False])
def test_what_one_rank_saw_all_know(lone_mesh, stop, finite):
    totals = sum_over_world(RESULTS, [], lone_mesh, stop_requested=stop, finite_norm=finite)
    assert (totals.stop_requested, totals.finite_norm) == (stop, finite)


@pytest.mark.usefixtures("lone_mesh")
@pytest.mark.parametrize(
    ("grid", "rank", "counts_loss", "counts_rows", "counts_samples"),
    [
        (RankGrid(tp_size=2), 0, True, True, True),
        (RankGrid(tp_size=2), 1, False, False, False),
        (RankGrid(cp_size=2), 1, True, True, False),
        (RankGrid(pp_size=2), 1, True, False, False),
        (RankGrid(dp_size=2), 1, True, True, True),
    ],
)
def test_what_several_ranks_hold_is_counted_once(grid, rank, counts_loss, counts_rows, counts_samples, batches):
    """Each rank adds its own part to the sum; in this world of one the sum is that part."""
    totals = sum_over_world(RESULTS, batches, Mesh(grid, rank), stop_requested=False)
    assert (totals.num_labels > 0, totals.work.tokens > 0, totals.work.samples > 0) == (
        counts_loss,
        counts_rows,
        counts_samples,
    )


def test_a_rank_without_the_head_adds_no_loss(lone_mesh, batches):
    totals = sum_over_world([], batches, lone_mesh, stop_requested=False)
    assert (totals.loss_sum, totals.num_labels) == (0.0, 0) and totals.work.samples == 4
    assert math.isnan(totals.loss)


@pytest.mark.parametrize(
    ("loss_sum", "num_labels", "finite_norm", "sound"),
    [
        (1.0, 1, True, True),
        (0.0, 0, True, False),
        (math.nan, 1, True, False),
        (math.inf, 1, True, False),
        (1.0, 1, False, False),
    ],
)
def test_an_update_needs_labels_and_finite_numbers(loss_sum, num_labels, finite_norm, sound):
    assert StepTotals(loss_sum, num_labels, Work(), stop_requested=False, finite_norm=finite_norm).sound == sound
