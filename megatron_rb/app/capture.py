"""What a process of `rb compare capture` does: trains a few steps only to capture them."""

from __future__ import annotations

from pathlib import Path

from megatron_rb.app.assemble import assemble
from megatron_rb.config.compose import CONFIG_FILE, config_from_file
from megatron_rb.metrics.heartbeat import Heartbeat
from megatron_rb.parallel.attempt import attempt_from_environment


def capture(folder: Path) -> None:
    """Capture the first `metrics.capture.limit` steps of the run in a folder; writes no checkpoint and no metrics."""
    config = config_from_file(folder / CONFIG_FILE)
    run = assemble(config, Heartbeat(None, None, 0), attempt_from_environment())
    steps = config.metrics.capture.limit
    try:
        for _ in range(min(steps, run.train_steps)):
            run.update(run.task.next_step().micro_batches, stop_requested=False)
            run.schedule.step()
            run.step += 1
            if run.mesh.rank == 0:
                print(f"captured step {run.step} of {steps}", flush=True)
    finally:
        run.close()
