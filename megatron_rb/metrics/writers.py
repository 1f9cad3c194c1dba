"""Where the numbers of a run go: jsonl, TensorBoard, console, plot. Only rank 0 writes."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from megatron_rb.config.schema import MetricsConfig
from megatron_rb.metrics.columns import tagged
from megatron_rb.metrics.console import ConsoleWriter
from megatron_rb.metrics.jsonl import JsonlWriter
from megatron_rb.metrics.record import EvalRecord, StepRecord
from megatron_rb.metrics.report import plot_curves
from megatron_rb.metrics.stragglers import SECTIONS, RankRecord

logger = logging.getLogger(__name__)

METRICS_FILE, PLOT_FILE, TENSORBOARD_FOLDER = "metrics.jsonl", "curves.png", "tensorboard"
RANKS_FILE = "stragglers.json"


class Writer(Protocol):
    """Takes the numbers of a run."""

    def write_step(self, record: StepRecord) -> None: ...

    def write_eval(self, record: EvalRecord) -> None: ...

    def write_ranks(self, record: RankRecord) -> None: ...

    def close(self) -> None: ...


class TensorBoardWriter:
    """Event files; what an earlier process of the run wrote past `first_step` is hidden."""

    def __init__(self, folder: str | Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # seconds of imports that only this class needs

        self._events = SummaryWriter(str(folder), purge_step=first_step + 1)

    def write_step(self, record: StepRecord) -> None:
        for tag, value in tagged(record).items():
            self._events.add_scalar(tag, value, record.step)

    def write_eval(self, record: EvalRecord) -> None:
        for name, value in record.values.items():
            self._events.add_scalar(f"evaluation/{name}", value, record.step)
        self._events.flush()

    def write_ranks(self, record: RankRecord) -> None:
        for section in SECTIONS:
            times = {times.rank: times.sections[section] for times in record.ranks}
            slowest = max(times, key=lambda rank: times[rank])
            self._events.add_scalar(f"ranks/{section}_slowest_seconds", times[slowest], record.step)
            self._events.add_scalar(f"ranks/{section}_slowest_rank", slowest, record.step)
        straggler = record.straggler()
        # -1: no rank holds the others up.
        self._events.add_scalar("ranks/straggler", straggler.rank if straggler else -1, record.step)

    def close(self) -> None:
        self._events.close()


class PlotWriter:
    """Draws the curves of a jsonl file at every evaluation and at the end."""

    def __init__(self, jsonl_path: str | Path, png_path: str | Path) -> None:
        self.paths = Path(jsonl_path), Path(png_path)
        self._stale = False

    def write_step(self, record: StepRecord) -> None:
        self._stale = True

    def write_eval(self, record: EvalRecord) -> None:
        if record.step > 0:  # an evaluation of the first weights has no curve yet
            self._stale = True
            self._draw()

    def write_ranks(self, record: RankRecord) -> None:
        """Not drawn."""

    def close(self) -> None:
        self._draw()

    def _draw(self) -> None:
        if not self._stale:
            return
        self._stale = False
        try:
            plot_curves(*self.paths)
        except Exception as error:  # a picture must not end a run
            logger.warning("%s was not drawn: %s", self.paths[1], error, exc_info=True)


class RanksFile:
    """The newest comparison of the ranks as JSON, with the one that holds the others up in words."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def write_step(self, record: StepRecord) -> None:
        """Not kept here."""

    def write_eval(self, record: EvalRecord) -> None:
        """Not kept here."""

    def write_ranks(self, record: RankRecord) -> None:
        straggler = record.straggler()
        content = asdict(record) | {"slow": str(straggler) if straggler else ""}
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(json.dumps(content))
        partial.replace(self.path)

    def close(self) -> None:
        """Nothing is open."""


class CompositeWriter:
    """Several writers as one; without any it writes nothing."""

    def __init__(self, writers: Sequence[Writer] = ()) -> None:
        self.writers = tuple(writers)

    def write_step(self, record: StepRecord) -> None:
        for writer in self.writers:
            writer.write_step(record)

    def write_eval(self, record: EvalRecord) -> None:
        for writer in self.writers:
            writer.write_eval(record)

    def write_ranks(self, record: RankRecord) -> None:
        for writer in self.writers:
            writer.write_ranks(record)

    def close(self) -> None:
        """Close every writer, even when one of them fails to."""
        with ExitStack() as stack:
            for writer in reversed(self.writers):
                stack.callback(writer.close)


def build_writers(
    config: MetricsConfig, run_dir: str | Path, train_steps: int, first_step: int, is_rank_zero: bool
) -> Writer:
    """The writers that the settings ask for, on rank 0; the other ranks write nothing.

    Args:
        first_step: step the run continues from, 0 for a new run.
    """
    if not is_rank_zero:
        return CompositeWriter()
    folder = Path(run_dir)
    # The plot reads the file of the writer before it.
    writers: list[Writer] = [JsonlWriter(folder / METRICS_FILE, first_step), RanksFile(folder / RANKS_FILE)]
    writers.append(ConsoleWriter(train_steps, first_step, config.log_every, config.progress))
    if config.tensorboard:
        writers.append(TensorBoardWriter(folder / TENSORBOARD_FOLDER, first_step))
    if config.plots:
        writers.append(PlotWriter(folder / METRICS_FILE, folder / PLOT_FILE))
    return CompositeWriter(writers)
