"""A process of `rb compare capture`: trains a few steps only to capture them; writes no checkpoint and no metrics."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from megatron_rb.config.compose import config_from_file
from megatron_rb.metrics.heartbeat import Heartbeat
from megatron_rb.parallel.attempt import attempt_from_environment
from megatron_rb.platform import get_platform
from megatron_rb.platform.mcore_shims import install_mcore_shims


def main(argv: Sequence[str]) -> int:
    """Capture the first `argv[1]` steps of the run that the config file `argv[0]` describes."""
    config, steps = config_from_file(argv[0]), int(argv[1])
    platform = get_platform(config.platform.name)
    install_mcore_shims(platform)  # before anything imports megatron-core

    from megatron_rb.app.assemble import assemble

    run = assemble(config, platform, Heartbeat(None, None, 0), attempt_from_environment())
    try:
        for _ in range(min(steps, run.train_steps)):
            run.update(run.task.next_step().micro_batches, stop_requested=False)
            run.schedule.step()
            run.step += 1
            if run.place.rank == 0:
                print(f"captured step {run.step} of {steps}", flush=True)
    finally:
        run.close()
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
