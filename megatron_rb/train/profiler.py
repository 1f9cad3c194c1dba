"""What a run is seen doing: traces of named steps, named ranges for vendors' profilers, snapshots of device memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_rb.config.schema import ProfileConfig
from megatron_rb.platform import Platform

logger = logging.getLogger(__name__)


class StepProfiler:
    """Profiles the steps that the settings name, on the ranks they name.

    Raises:
        ValueError: a history of memory is wanted of a platform that keeps none.
    """

    def __init__(self, settings: ProfileConfig, folder: Path, rank: int, platform: Platform) -> None:
        if settings.memory and not platform.offers("memory_history"):
            raise ValueError(
                f"metrics.profile.memory is true and platform {platform.name} keeps no history of its memory; "
                f"set it to false"
            )
        self.settings, self.folder, self.rank, self.platform = settings, folder, rank, platform
        if settings.memory:
            platform.record_memory_history(True)

    @property
    def asked(self) -> bool:
        return self.rank in self.settings.ranks

    def named_range(self, name: str) -> AbstractContextManager[Any]:
        """A part of a step as profilers show it."""
        return self.platform.named_range(name)

    @contextmanager
    def of_step(self, step: int) -> Iterator[None]:
        """The block is step `step`."""
        try:
            with self._trace(step), self.platform.named_range(f"step {step}"):
                yield
        except torch.OutOfMemoryError:
            if self.settings.memory:
                self._write(f"out-of-memory.step{step}", ".pickle", self.platform.write_memory_snapshot)
            raise
        if self.settings.memory and self.asked and step == max(self.settings.steps, default=0):
            self._write(f"memory.step{step}", ".pickle", self.platform.write_memory_snapshot)

    @contextmanager
    def _trace(self, step: int) -> Iterator[None]:
        if not self.asked or step not in self.settings.steps:
            yield
            return
        # Nothing of the step before may lie in the trace, and all of this step must.
        self.platform.synchronize()
        with torch.profiler.profile(
            activities=self.platform.profiler_activities(), record_shapes=True, profile_memory=True
        ) as profile:
            yield
            self.platform.synchronize()
        self._write(f"step{step}", ".json.gz", lambda path: profile.export_chrome_trace(str(path)))

    def _write(self, name: str, suffix: str, write: Callable[[Path], None]) -> None:
        """A file that is there whole or not at all; what fails here ends no run."""
        path = self.folder / f"{name}.rank{self.rank}{suffix}"
        partial = path.with_name(f"partial-{path.name}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write(partial)
            partial.replace(path)
        except OSError as error:
            logger.warning("%s was not written: %s", path, error)
        else:
            logger.info("wrote %s", path)
