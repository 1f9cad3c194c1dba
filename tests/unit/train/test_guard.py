"""Which updates are kept out of the weights, when a run ends, and what is said."""

import logging
import math

import pytest
import torch

from megatron_rb.config.failures import NotFinite
from megatron_rb.models.work import Work
from megatron_rb.train.guard import (
    Finding,
    UpdateGuard,
    check_state,
    describe,
    find_not_finite,
    not_finite_parameters,
)
from megatron_rb.train.totals import StepTotals

GOOD = StepTotals(2.0, 4, Work(samples=3), stop_requested=False)
BAD = StepTotals(math.nan, 4, Work(samples=3), stop_requested=False)
EMPTY = StepTotals(0.0, 0, Work(samples=3), stop_requested=False)


@pytest.mark.usefixtures("lone_mesh")
def test_skipped_updates_are_counted_in_all_and_in_a_row():
    guard = UpdateGuard(limit=3)
    for number, totals in enumerate([BAD, BAD, GOOD, EMPTY]):
        guard.note(number, totals, 1.0, [])
    assert (guard.skipped, guard.in_row, guard.open) == (3, 1, False)
    guard.note(4, GOOD, 1.0, [])
    assert (guard.skipped, guard.in_row, guard.open) == (3, 0, True)


@pytest.mark.usefixtures("lone_mesh")
def test_a_skipped_update_is_one_line_in_the_log(caplog):
    with caplog.at_level(logging.WARNING):
        UpdateGuard(limit=3, skipped=4).note(7, BAD, math.inf, [Finding(0, "loss", "micro-batch 1 with a.jpg")])
    assert [record.message for record in caplog.records] == [
        "step 7: loss nan, gradient norm inf, loss not finite on rank 0, micro-batch 1 with a.jpg; "
        "the update is skipped (1 in a row, 5 in all)"
    ]


@pytest.mark.usefixtures("lone_mesh")
def test_a_run_is_hopeless_at_its_limit_or_when_the_weights_are_broken():
    guard = UpdateGuard(limit=2)
    guard.note(1, BAD, None, [])
    assert not guard.hopeless([Finding(0, "loss", "")]) and guard.hopeless([Finding(0, "weights", "")])
    guard.note(2, BAD, None, [])
    assert guard.hopeless([])


@pytest.mark.usefixtures("lone_mesh")
@pytest.mark.parametrize(
    ("totals", "error", "message"),
    [
        (BAD, NotFinite, "step 1: loss nan; 1 updates in a row .*max_bad_steps 1.*; lower optimizer.lr.*; go back"),
        (EMPTY, ValueError, "none of its 3 samples could be read; 1 updates.*; ledger.jsonl names the files"),
    ],
)
def test_the_end_tells_the_last_reason_and_the_way_back(totals, error, message):
    guard = UpdateGuard(limit=1)
    guard.note(1, totals, None, [])
    with pytest.raises(error, match=message):
        guard.fail(totals, "go back")


def test_of_gradients_the_block_that_the_backward_pass_reached_first_is_named():
    """The backward pass visits the last pipeline rank first; what it passes on is broken everywhere else."""
    findings = [Finding(rank, "gradients", f"block {rank}", (0, rank)) for rank in range(4)]
    assert describe(1, BAD, 2.0, findings).endswith("gradient norm 2, gradients not finite on rank 3, block 3")


def test_of_many_places_three_are_named_and_the_rest_is_counted():
    findings = [Finding(rank, "weights", "w") for rank in range(5)]
    assert describe(1, BAD, None, findings).endswith("rank 0, w; rank 1, w; rank 2, w and on 2 ranks more")


def spoil(chunk, name: str, attribute: str, value: float = math.nan) -> None:
    parameter = dict(chunk.named_parameters())[f"module.{name}"]
    getattr(parameter, attribute).view(-1)[-1] = value


FINE = [{"loss_sum": torch.tensor(1.0)}] * 2


def test_where_nothing_is_wrong_nothing_is_found(trainable, batches, lone_mesh):
    assert find_not_finite(trainable.chunks, FINE, batches, lone_mesh) == []


def test_a_loss_is_traced_to_the_samples_of_its_micro_batch(trainable, batches, lone_mesh):
    results = [FINE[0], {"loss_sum": torch.tensor(math.inf)}]
    [finding] = find_not_finite(trainable.chunks, results, batches, lone_mesh)
    assert finding == Finding(0, "loss", "micro-batch 1 with drawn-3")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_single_broken_weight_is_found_and_named_with_its_part(trainable, batches, lone_mesh, value):
    spoil(trainable.chunks[0], "vision.merger.norm.weight", "data", value)
    [finding] = find_not_finite(trainable.chunks, FINE, batches, lone_mesh)
    assert finding == Finding(0, "weights", "merger (vision.merger.norm.weight)")
    assert not_finite_parameters(trainable.chunks) == ["merger (vision.merger.norm.weight)"]


def test_the_gradient_nearest_to_the_loss_is_named(trainable, batches, lone_mesh):
    for name in ("vision.merger.norm.weight", "language.layers.1.mlp.linear_fc2.weight"):
        spoil(trainable.chunks[0], name, "main_grad")
    [finding] = find_not_finite(trainable.chunks, FINE, batches, lone_mesh)
    assert finding == Finding(0, "gradients", "language (language.layers.1.mlp.linear_fc2.weight)", (0, 0))


def test_gradients_of_frozen_weights_do_not_count(trainable, batches, lone_mesh):
    spoil(trainable.chunks[0], "vision.merger.norm.weight", "main_grad")
    dict(trainable.chunks[0].named_parameters())["module.vision.merger.norm.weight"].requires_grad_(False)
    assert find_not_finite(trainable.chunks, FINE, batches, lone_mesh) == []


def test_a_sound_state_may_be_saved(trainable):
    check_state(trainable.chunks, trainable.optimizer, step=3)


def test_broken_weights_are_not_saved(trainable):
    spoil(trainable.chunks[0], "language.head.norm.weight", "data")
    with pytest.raises(
        NotFinite, match=r"after step 3 rank 0 holds .* in language \(language.head.norm.weight\).*; no"
    ):
        check_state(trainable.chunks, trainable.optimizer, step=3)


def test_a_broken_sum_of_the_optimizer_is_not_saved(trainable):
    part = trainable.optimizer.chained_optimizers[0]
    state = next(iter(part.optimizer.state.values()))
    state["exp_avg_sq"].view(-1)[0] = math.inf
    with pytest.raises(NotFinite, match="in the state of the optimizer; no checkpoint of them is written"):
        check_state(trainable.chunks, trainable.optimizer, step=3)
