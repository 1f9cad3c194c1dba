"""The numbers of a run on the console: a progress bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections import deque

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from megatron_rb.metrics.columns import line
from megatron_rb.metrics.record import EvalRecord, StepRecord
from megatron_rb.metrics.stragglers import RankRecord

RECENT_STEPS = 50
"""Steps the remaining time is estimated from."""


class ConsoleWriter:
    """Shows steps and evaluations.

    Args:
        train_steps: last step of the run.
        first_step: step the run continues from.
        log_every: steps between plain lines; the bar is refreshed at every step.
        bar: show the progress bar when the output is a terminal.
    """

    def __init__(
        self, train_steps: int, first_step: int, log_every: int, bar: bool = True, console: Console | None = None
    ) -> None:
        self.train_steps = train_steps
        self.log_every = log_every
        # A line must stay one line in a log file, whatever width the console assumes.
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self._bar = _Bar(self.console, train_steps, first_step) if bar and self.console.is_terminal else None

    def write_step(self, record: StepRecord) -> None:
        self.recent.append(record.seconds)
        left = remaining_seconds(self.recent, self.train_steps - record.step)
        if self._bar is not None:
            self._bar.show(record, left)
        elif record.step % self.log_every == 0 or record.step == self.train_steps:
            steps = f"step {record.step}/{self.train_steps}"
            self._print(f"{time.strftime('%H:%M:%S')}  {steps}  epoch {record.epoch}  {describe(record, left)}")

    def write_eval(self, record: EvalRecord) -> None:
        values = "  ".join(f"{name} {value:.4g}" for name, value in record.values.items())
        self._print(f"{time.strftime('%H:%M:%S')}  evaluation at step {record.step}  {values}")

    def write_ranks(self, record: RankRecord) -> None:
        straggler = record.straggler()
        if straggler is not None:
            self._print(f"{time.strftime('%H:%M:%S')}  step {record.step}: {straggler} holds the others up")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


class _Bar:
    """A bar that stays at the bottom, the numbers of the newest step below it."""

    def __init__(self, console: Console, train_steps: int, first_step: int) -> None:
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f} %"),
            console=console,
            expand=True,
        )
        self.task = self.progress.add_task("", total=train_steps, completed=first_step)
        self.live = Live(Group(self.progress), console=console, refresh_per_second=4)
        self.live.start()

    def show(self, record: StepRecord, left: float) -> None:
        self.progress.update(self.task, completed=record.step)
        self.live.update(Group(self.progress, Text(describe(record, left), style="cyan")))

    def close(self) -> None:
        self.live.stop()


def describe(record: StepRecord, left: float) -> str:
    """The numbers of a step in one line.

    Args:
        left: estimated seconds until the end of the run.
    """
    return "  ".join([*line(record), f"left {duration(left)}"])


def remaining_seconds(recent: deque[float], steps: int) -> float:
    """Time that is left at the pace of the recent steps."""
    return sum(recent) / len(recent) * max(steps, 0) if recent else 0.0


def duration(seconds: float) -> str:
    """`42s`, `3m05s`, `2h07m`, `3d04h`."""
    whole = round(seconds)
    for size, unit, part, part_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // part:02d}{part_unit}"
    return f"{whole}s"
