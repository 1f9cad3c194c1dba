"""A training process, from `key=value` settings to a finished run; started by `rb launch`, srun or torchrun."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

import torch

from megatron_rb.config.compose import config_from_file, load_config
from megatron_rb.config.schema import Config
from megatron_rb.metrics.heartbeat import Heartbeat
from megatron_rb.parallel.attempt import attempt_from_environment
from megatron_rb.platform import get_platform
from megatron_rb.platform.mcore_shims import install_mcore_shims


def main(argv: Sequence[str]) -> int:
    """Train as the settings say; 0 when the run has finished or was stopped and saved.

    Args:
        argv: `key=value` settings, or `--config FILE` with a config that the launcher has resolved.

    Raises:
        ValueError: settings, data or checkpoint do not fit; nothing has been trained then.
    """
    config = config_from_file(argv[1]) if argv[:1] == ["--config"] else load_config(list(argv))
    show_log_lines()
    platform = get_platform(config.platform.name)
    install_mcore_shims(platform)  # before anything imports megatron-core

    from megatron_rb.app.assemble import assemble
    from megatron_rb.parallel.groups import world_from_environment
    from megatron_rb.train.loop import train

    attempt = attempt_from_environment()
    heartbeat = Heartbeat(attempt.beats, attempt.stacks, world_from_environment()[0])
    run = assemble(config, platform, heartbeat, attempt)
    try:
        finished = train(run)
    finally:
        run.close()
    heartbeat.leave(finished)
    if run.place.rank == 0:
        _say_goodbye(config, run.step, finished)
    torch.distributed.destroy_process_group()
    return 0


def show_log_lines() -> None:
    """Print what the run logs, such as complete checkpoints, to stderr, once per process."""
    ours = logging.getLogger("megatron_rb")
    if ours.handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False
    # The choice of kernels is one line at the start of the run.
    logging.getLogger("megatron_rb.kernels").setLevel(logging.WARNING)


def _say_goodbye(config: Config, step: int, finished: bool) -> None:
    if finished:
        print(f"{config.name}: finished {step} steps", flush=True)
    else:
        print(f"{config.name}: stopped after step {step}; the same command continues it", flush=True)


if __name__ == "__main__":
    from megatron_rb.cli import main as rb

    sys.exit(rb(["train", *sys.argv[1:]]))
