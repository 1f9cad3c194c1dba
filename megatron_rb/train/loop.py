"""The training loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from megatron_rb.train.run import Run
from megatron_rb.train.signals import StopRequest
from megatron_rb.train.totals import StepTotals

logger = logging.getLogger(__name__)


def train(run: Run) -> bool:
    """Train until the last step or a stop signal; either way the last step is saved.

    Returns:
        True when the run has finished, False when it was stopped and can be continued.
    """
    config = run.config
    with StopRequest() as stop:
        if config.schedule.eval_at_start and run.step == 0:
            run.evaluate()
        last: StepTotals | None = None
        while not run.finished:
            last = take_step(run, lambda: stop.requested)
            if run.due(config.schedule.eval_every):
                run.evaluate()
            run.save_if_due()
            run.checkpoints.maybe_finalize()
            if last.stop_requested:
                logger.warning(
                    "stopped by %s after step %d: saving", stop.reason or "a signal to another rank", run.step
                )
                break
        run.save_last(last)
        run.finish_saving()
    if run.finished:
        run.evaluate()
    return run.finished


def take_step(run: Run, stop_requested: Callable[[], bool] = lambda: False) -> StepTotals:
    """One optimizer step with its report; ends the run when too many updates in a row had to be skipped.

    Args:
        stop_requested: asked after the batches are there, which is where a step may have waited.
    """
    start = time.perf_counter()
    run.timers.begin_step(run.step)
    rates = run.schedule.learning_rates()
    with run.profiler.of_step(run.step + 1):
        data = run.next_batches()
        outcome = run.update(data.micro_batches, stop_requested())
    run.schedule.step()
    run.step += 1
    run.report(data, outcome, rates, start)
    run.check(outcome)
    run.compare_ranks(data, start)
    run.heartbeat.finish_step(run.step)
    return outcome.totals
