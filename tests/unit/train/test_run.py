"""What a run does at the end of a step: update or not, save or not, end or go on."""

import logging
import math
import random
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_rb.config.failures import NotFinite
from megatron_rb.layout.mesh import RankGrid
from megatron_rb.metrics.heartbeat import Heartbeat
from megatron_rb.models.work import Work
from megatron_rb.parallel.mesh import Mesh
from megatron_rb.platform.cpu import CpuPlatform
from megatron_rb.train.guard import Finding, UpdateGuard
from megatron_rb.train.run import Run, StepOutcome, layout_state, seed_everything
from megatron_rb.train.step import Runner, train_pass
from megatron_rb.train.task import StepBatches
from megatron_rb.train.timers import StepTimers
from megatron_rb.train.totals import StepTotals

GOOD = StepTotals(2.0, 4, Work(samples=3, tokens=9), stop_requested=False)
BAD = StepTotals(math.nan, 4, Work(samples=3), stop_requested=False)


class Recorder:
    """Any method may be called; its name and arguments are kept."""

    def __init__(self, **answers) -> None:
        self.calls: list[tuple] = []
        self.answers = answers

    def __getattr__(self, name: str):
        return lambda *arguments, **options: self.calls.append((name, *arguments)) or self.answers.get(name)


@pytest.fixture
def parts(session, trainable, config):
    """A run whose model is real and whose surroundings write down what is asked of them."""
    profiler = SimpleNamespace(named_range=lambda name: nullcontext(), of_step=lambda step: nullcontext())
    return {
        "config": config,
        "session": session,
        "chunks": trainable.chunks,
        "optimizer": trainable.optimizer,
        "schedule": None,
        "task": Recorder(evaluate={"loss": 1.5}),
        "checkpoints": Recorder(way_back="go back"),
        "writer": Recorder(),
        "train_steps": 10,
        "state": "the state",
        "heartbeat": Heartbeat(None, None, 0),
        "timers": StepTimers([], CpuPlatform(), every=0),
        "capture": SimpleNamespace(of_step=lambda step, batches: nullcontext()),
        "guard": UpdateGuard(limit=2),
        "profiler": profiler,
        "peak": None,
        "step": 4,
    }


@pytest.fixture
def run(parts):
    return Run(**parts)


def weights(run) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in run.chunks[0].parameters()])


def trained(run, batches):
    return train_pass(Runner(run.chunks, run.session), batches)


def test_a_sound_step_changes_the_weights(run, batches):
    run.task.run = lambda given: trained(run, given)
    before = weights(run)
    outcome = run.update(batches, stop_requested=False)
    assert outcome.totals.sound and outcome.grad_norm > 0 and outcome.findings == []
    assert not torch.equal(before, weights(run))


@pytest.mark.parametrize("broken", ["loss", "gradient", "labels"])
def test_a_step_that_cannot_be_meant_leaves_the_weights_as_they_are(run, batches, broken):
    def spoiled(given):
        results = trained(run, given)
        if broken == "gradient":
            run.chunks[0].module.language.head.norm.weight.main_grad[0] = math.nan
        for result in results:
            result["loss_sum"] *= math.nan if broken == "loss" else 1
            result["num_labels"] *= 0 if broken == "labels" else 1
        return results

    run.task.run = spoiled
    before = weights(run)
    outcome = run.update(batches, stop_requested=False)
    assert not outcome.totals.sound and torch.equal(before, weights(run))
    assert [finding.kind for finding in outcome.findings] == {"loss": ["loss"] * 2, "gradient": ["gradients"]}.get(
        broken, []
    )


def test_a_good_step_proves_the_weights_before_it(run):
    run.check(StepOutcome(GOOD, 1.0))
    assert run.checkpoints.calls == [("prove", 3)]


def test_a_skipped_step_proves_nothing_and_the_limit_ends_the_run(run):
    run.check(StepOutcome(BAD, 1.0))
    assert run.checkpoints.calls == []
    with pytest.raises(NotFinite, match="go back"):
        run.check(StepOutcome(BAD, 1.0))
    assert run.checkpoints.calls == [("set_aside_unproven",), ("way_back",)]


def test_broken_weights_end_the_run_at_once(run):
    with pytest.raises(NotFinite, match="weights not finite on rank 0, somewhere"):
        run.check(StepOutcome(BAD, 1.0, [Finding(0, "weights", "somewhere")]))


def test_a_run_that_ends_without_anything_to_learn_keeps_its_checkpoints(run):
    empty = StepOutcome(StepTotals(0.0, 0, Work(samples=3), stop_requested=False), None)
    run.check(empty)
    with pytest.raises(ValueError, match="nothing to learn"):
        run.check(empty)
    assert ("set_aside_unproven",) not in run.checkpoints.calls


def test_a_step_is_saved_once(run):
    run.save()
    run.save()
    assert run.checkpoints.calls == [("save", 4, "the state")] and run.saved_step == 4


def test_a_save_that_is_due_waits_for_a_good_step(run):
    run.config.checkpoint.save_every = 4
    run.guard.note(4, BAD, None, [])
    run.save_if_due()
    run.step = 5
    run.guard.note(5, GOOD, None, [])
    run.save_if_due()
    run.save_if_due()
    assert run.checkpoints.calls == [("save", 5, "the state")]


def test_weights_that_are_not_finite_are_not_saved(run):
    with torch.no_grad():
        run.chunks[0].module.language.head.norm.weight[0] = math.nan
    with pytest.raises(NotFinite, match="no checkpoint of them is written"):
        run.save()
    assert run.checkpoints.calls == []


def test_a_run_that_is_stopped_while_updates_are_skipped_is_not_saved(run, caplog):
    run.guard.note(4, BAD, None, [])
    with caplog.at_level(logging.WARNING):
        run.save_last(BAD)
    assert run.checkpoints.calls == [] and "not saved: step 4: loss nan" in caplog.text


def test_a_run_that_ends_while_updates_are_skipped_has_failed(run):
    run.guard.note(4, BAD, None, [])
    run.step = run.train_steps
    with pytest.raises(NotFinite):
        run.save_last(BAD)


def test_a_step_is_evaluated_once_and_a_finite_loss_proves_its_weights(run):
    assert run.evaluate() == run.evaluate() == {"loss": 1.5}
    assert run.task.calls == [("evaluate",)] and run.checkpoints.calls == [("prove", 4)]
    [(name, record)] = run.writer.calls
    assert (name, record.step, record.values) == ("write_eval", 4, {"loss": 1.5})


def test_an_evaluation_that_is_not_finite_proves_nothing_and_is_said(run, caplog):
    run.task.answers["evaluate"] = {"loss": math.nan}
    with caplog.at_level(logging.WARNING):
        run.evaluate()
    assert run.checkpoints.calls == [] and "evaluation at step 4 is not finite: {'loss': nan}" in caplog.text


@pytest.mark.parametrize(("every", "due"), [(0, False), (2, True), (3, False), (4, True)])
def test_what_happens_every_so_many_steps(run, every, due):
    assert run.due(every) is due


@pytest.mark.parametrize(("totals", "skipped"), [(GOOD, 1), (BAD, 2)])
def test_the_record_of_a_step_counts_its_own_skipped_update(run, totals, skipped):
    run.guard.skipped = 1
    run.report(StepBatches([], epoch=2, wait_seconds=0.25), StepOutcome(totals, 3.0), {"vision": 1e-5}, start=0.0)
    [(_, record)] = run.writer.calls
    assert (record.step, record.epoch, record.grad_norm, record.data_wait_seconds) == (4, 2, 3.0, 0.25)
    assert (record.num_samples, record.num_labels, record.skipped_updates) == (3, 4, skipped)


def test_ranks_are_compared_after_a_measured_step_alone(run):
    run.compare_ranks(StepBatches([], 0, wait_seconds=0.5), start=0.0)
    assert run.writer.calls == []
    run.timers.active = True
    run.compare_ranks(StepBatches([], 0, wait_seconds=0.5), start=0.0)
    [(name, record)] = run.writer.calls
    assert name == "write_ranks" and record.ranks[0].sections["data"] == 0.5 and run.heartbeat.sections["data"] == 0.5


def test_closing_completes_checkpoints_before_the_writers(run):
    order = []
    for name in ("checkpoints", "writer", "task"):
        setattr(run, name, SimpleNamespace(close=lambda name=name: order.append(name)))
    run.close()
    assert order == ["checkpoints", "writer", "task"]


def test_one_seed_seeds_every_generator():
    drawn = []
    for seed in (2**40 + 1, 2**40 + 1, 7):
        seed_everything(seed, CpuPlatform())
        drawn.append((random.random(), np.random.rand(), float(torch.rand(()))))
    assert drawn[0] == drawn[1] and all(one != other for one, other in zip(drawn[0], drawn[2], strict=True))


def test_the_state_of_a_layout_names_all_that_results_depend_on(session):
    there = replace(session, mesh=Mesh(RankGrid(tp_size=2, cp_size=3, dp_size=4, pp_size=5)))
    degrees = {"tp_size": 2, "cp_size": 3, "dp_size": 4, "pp_size": 5}
    rest = {"pipeline": str(session.layout), "sequence_parallel": True}
    assert layout_state(there, sequence_parallel=True) == degrees | rest
