"""A training process, from its settings to a finished run; started by `rb launch`, srun or torchrun."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_rb.app.log_lines import show_log_lines
from megatron_rb.app.session import adapt_megatron
from megatron_rb.config.compose import CONFIG_FILE, config_from_file, load_config
from megatron_rb.config.schema import Config
from megatron_rb.metrics.heartbeat import Heartbeat
from megatron_rb.parallel.attempt import attempt_from_environment
from megatron_rb.parallel.world import leave_world, world_from_environment


def main(argv: Sequence[str]) -> int:
    """Train as the settings say; 0 when the run has finished or was stopped and saved.

    Args:
        argv: `key=value` settings, or `--config FILE` with a config that the launcher has resolved.

    Raises:
        ValueError: settings, data or checkpoint do not fit; nothing has been trained then.
    """
    config = config_from_file(argv[1]) if argv[:1] == ["--config"] else load_config(list(argv))
    show_log_lines()
    train_as(config)
    leave_world()
    return 0


def train_folder(folder: Path) -> None:
    """Train as the `config.yaml` of a run folder says."""
    train_as(config_from_file(folder / CONFIG_FILE))


def train_as(config: Config) -> None:
    """Train until the run has finished or is stopped; it is saved either way."""
    adapt_megatron(config.platform.name)
    # These import megatron-core.
    from megatron_rb.app.assemble import assemble
    from megatron_rb.train.loop import train

    attempt = attempt_from_environment()
    heartbeat = Heartbeat(attempt.beats, attempt.stacks, world_from_environment()[0])
    run = assemble(config, heartbeat, attempt)
    try:
        finished = train(run)
    finally:
        run.close()
    heartbeat.leave(finished)
    if run.mesh.rank == 0:
        _say_goodbye(config, run.step, finished)


def _say_goodbye(config: Config, step: int, finished: bool) -> None:
    if finished:
        print(f"{config.name}: finished {step} steps", flush=True)
    else:
        print(f"{config.name}: stopped after step {step}; the same command continues it", flush=True)
