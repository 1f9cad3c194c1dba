"""`rb launch`: reads the words of the command line and calls the action; imports no torch."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_rb.config.compose import expand_sweep, load_config
from megatron_rb.launch import actions
from megatron_rb.launch.actions import ACTIONS, Options
from megatron_rb.launch.command import build_commands
from megatron_rb.launch.job import JobSpec
from megatron_rb.launch.local import start_ranks
from megatron_rb.launch.supervise import Supervisor, caught_signals

OF_A_RUN = ("status", "logs", "stop", "requeue")
"""Actions on a run that is there; they need nothing but its folder."""


def split_words(words: Sequence[str]) -> tuple[Options, list[str]]:
    """Separate `action=`, `follow=` and `rehearse=` from the settings of the run.

    Raises:
        ValueError: there is no such action, one of the others is neither true nor false, or one of them is said twice.
    """
    options, settings = Options(), []
    said: dict[str, str] = {}
    for word in words:
        key, _, value = word.partition("=")
        if key in said:
            raise ValueError(f"{key} is given twice, as {said[key]} and as {value}; leave one of them out")
        if key in ("action", "follow", "rehearse"):
            said[key] = value
        if key == "action":
            if value not in ACTIONS:
                close = difflib.get_close_matches(value, ACTIONS, n=1)
                hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(ACTIONS)}"
                raise ValueError(f"there is no action '{value}'{hint}")
            options = replace(options, action=value)
        elif key in ("follow", "rehearse"):
            if value not in ("true", "false"):
                raise ValueError(f"{key} must be true or false, got '{value}'")
            yes = value == "true"
            options = replace(options, follow=yes) if key == "follow" else replace(options, rehearse=yes)
        else:
            settings.append(word)
    return options, settings


def act_on_run(options: Options, settings: Sequence[str]) -> int:
    """Status, logs, stop or requeue of the run that the settings name by `run_dir=`, `name=` or a recipe."""
    if options.action == "status" and not settings:
        return actions.show_status(None, options.as_json)
    if not settings:
        raise ValueError(f"action={options.action} needs a run: give run_dir=..., name=... or experiment=...")
    run_dir = Path(load_config(settings).run_dir).absolute()
    if options.action == "status":
        return actions.show_status(run_dir, options.as_json)
    if options.action == "logs":
        return actions.show_logs(run_dir, options)
    if options.action == "stop":
        return actions.stop(run_dir, options.now)
    return actions.requeue(run_dir)


def sweep_of(settings: Sequence[str]) -> list[list[str]]:
    """The settings of every run of a sweep (`optimizer.lr=1e-4,3e-4`); one entry when there is none."""
    return expand_sweep(settings)


def run_job(job: JobSpec) -> int:
    """Start all ranks of a job on this machine once and wait; 0, or the code that the launcher shall exit with."""
    commands = build_commands(job, sys.executable)
    with caught_signals() as received:
        return Supervisor(start_ranks(commands), received, job.patience.grace).run()
