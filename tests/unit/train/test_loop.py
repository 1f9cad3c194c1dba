"""The order of things in a training run."""

import logging
import os
import signal
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from megatron_rb.config.schema import Config
from megatron_rb.models.work import Work
from megatron_rb.train.loop import train
from megatron_rb.train.run import StepOutcome
from megatron_rb.train.totals import StepTotals


class RecordingRun:
    """Stands in for `Run`: writes down what the loop asks of it.

    Args:
        stop_at: step in which some rank received a stop signal; 0 = none.
    """

    def __init__(self, train_steps: int, stop_at: int = 0, step: int = 0) -> None:
        self.config = Config()
        self.calls: list[str] = []
        self.train_steps, self.stop_at, self.step = train_steps, stop_at, step
        self.timers = self.recording("timers", "begin_step")
        self.heartbeat = self.recording("heartbeat", "finish_step")
        self.checkpoints = self.recording("checkpoints", "maybe_finalize")
        self.schedule = SimpleNamespace(learning_rates=self.rates, step=self.calling("schedule.step"))
        self.profiler = SimpleNamespace(of_step=self.of_step)
        for name in ("report", "check", "compare_ranks", "evaluate", "save_if_due", "save_last", "finish_saving"):
            setattr(self, name, self.calling(name))

    def recording(self, name: str, method: str) -> SimpleNamespace:
        return SimpleNamespace(**{method: self.calling(f"{name}.{method}")})

    def calling(self, name: str):
        return lambda *arguments: self.calls.append(name)

    def rates(self) -> dict[str, float]:
        self.calls.append("rates")
        return {}

    @contextmanager
    def of_step(self, step: int):
        self.calls.append(f"[{step}")
        yield
        self.calls.append("]")

    @property
    def finished(self) -> bool:
        return self.step >= self.train_steps

    def due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def next_batches(self) -> SimpleNamespace:
        self.calls.append("next_batches")
        return SimpleNamespace(micro_batches=[])

    def update(self, batches, stop_requested: bool) -> StepOutcome:
        self.calls.append("update")
        stopped = stop_requested or self.step + 1 == self.stop_at
        return StepOutcome(StepTotals(1.0, 1, Work(), stop_requested=stopped), 1.0)


STEP = ["timers.begin_step", "rates", "[1", "next_batches", "update", "]", "schedule.step", "report", "check"]
STEP += ["compare_ranks", "heartbeat.finish_step", "save_if_due", "checkpoints.maybe_finalize"]
END = ["save_last", "finish_saving"]


def test_a_step_is_reported_before_it_is_judged_and_judged_before_it_is_saved():
    run = RecordingRun(train_steps=1)
    assert train(run) is True
    assert run.calls == [*STEP, *END, "evaluate"]


def test_a_run_makes_all_steps_that_are_left():
    run = RecordingRun(train_steps=5, step=2)
    train(run)
    assert [call for call in run.calls if call.startswith("[")] == ["[3", "[4", "[5"] and run.step == 5


def test_a_finished_run_is_saved_and_evaluated_and_makes_no_step():
    run = RecordingRun(train_steps=3, step=3)
    assert train(run) is True
    assert run.calls == [*END, "evaluate"]


@pytest.mark.parametrize(("step", "evaluations"), [(0, 2), (1, 1)])
def test_the_first_weights_are_evaluated_when_asked_and_the_run_is_new(step, evaluations):
    run = RecordingRun(train_steps=2, step=step)
    run.config.schedule.eval_at_start = True
    train(run)
    assert run.calls.count("evaluate") == evaluations and run.calls[0] == ("timers.begin_step" if step else "evaluate")


def test_the_model_is_evaluated_before_the_checkpoint_of_the_same_step():
    run = RecordingRun(train_steps=4)
    run.config.schedule.eval_every = 2
    train(run)
    assert [call for call in run.calls if call in ("evaluate", "save_if_due")] == [
        "save_if_due",
        "evaluate",
        "save_if_due",
        "save_if_due",
        "evaluate",
        "save_if_due",
        "evaluate",
    ]


def test_a_run_that_is_stopped_is_saved_at_once_and_not_evaluated(caplog):
    run = RecordingRun(train_steps=9, stop_at=2)
    with caplog.at_level(logging.WARNING):
        assert train(run) is False
    assert run.step == 2 and run.calls[-2:] == END and "evaluate" not in run.calls
    assert "stopped by a signal to another rank after step 2: saving" in caplog.text


def test_a_signal_to_this_rank_stops_the_run_behind_its_step(caplog):
    run = RecordingRun(train_steps=9)
    run.next_batches = lambda: os.kill(os.getpid(), signal.SIGUSR1) or SimpleNamespace(micro_batches=[])
    with caplog.at_level(logging.WARNING):
        assert train(run) is False
    assert run.step == 1 and "stopped by SIGUSR1 after step 1" in caplog.text


def test_a_run_that_is_stopped_in_its_last_step_has_finished():
    run = RecordingRun(train_steps=2, stop_at=2)
    assert train(run) is True and run.calls[-1] == "evaluate"


def test_the_last_totals_are_those_of_the_step_before_the_end():
    run, given = RecordingRun(train_steps=2, step=2), []
    run.save_last = given.append
    train(run)
    run = RecordingRun(train_steps=2)
    run.save_last = given.append
    train(run)
    assert given[0] is None and given[1].num_labels == 1
