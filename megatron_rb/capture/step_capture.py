"""`StepCapture`: in one step of many, what passes the blocks is written down, to be compared with another run's."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_rb.capture.files import DESCRIPTION, VERSION, RankFile, step_folder, write_json
from megatron_rb.capture.recorder import Recorder
from megatron_rb.capture.samples import (
    Pick,
    choose,
    pick_rows,
    pixel_hash,
    placed_samples,
    segments_of,
    text_hash,
)
from megatron_rb.capture.weights import keep_weights
from megatron_rb.config.schema import CaptureConfig
from megatron_rb.models.inputs import MicroBatch
from megatron_rb.models.stage import RoboBrainStage
from megatron_rb.parallel.collectives import gather_from_all, wait_for_all
from megatron_rb.parallel.mesh import Mesh

logger = logging.getLogger(__name__)


PARTS = ("samples", "rows", "context", "features")
"""Settings that say which parts of a step are kept; both sides of a comparison must have the same."""


def kept_parts(settings: CaptureConfig) -> dict[str, int]:
    """What the description of a capture says about its settings."""
    return {name: getattr(settings, name) for name in PARTS}


class StepCapture:
    """Captures step 1 and every `every`-th after it; in all other steps it costs nothing but a test.

    A capture that cannot be written (disk full) is given up with a warning; the run goes on.

    Args:
        folder: gets a folder per captured step.
        description: what was run (model, layout, platform), JSON-able; equal on all ranks.
    """

    def __init__(
        self,
        settings: CaptureConfig,
        folder: Path,
        stages: Sequence[RoboBrainStage],
        mesh: Mesh,
        description: Mapping[str, Any],
    ) -> None:
        self.settings = settings
        self.folder = folder
        self.stages = list(stages)
        self.mesh = mesh
        self.description = dict(description)
        self.done = 0
        """Steps captured by this process."""

    def due(self, step: int) -> bool:
        """Is this step (counted from 1) captured?"""
        settings = self.settings
        return settings.every > 0 and (step - 1) % settings.every == 0 and self.done < settings.limit

    @contextmanager
    def of_step(self, step: int, batches: Sequence[MicroBatch]) -> Iterator[None]:
        """Surrounds the forward and backward passes of a step; every rank enters it."""
        if not self.due(step):
            yield
            return
        self.done += 1
        folder = step_folder(self.folder, step)
        if self.mesh.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)  # of an attempt that did this step before
        wait_for_all()
        file = RankFile(folder, self.mesh.rank)
        picks, names = self._picks(batches, file)
        recorder = Recorder(self.stages, batches, picks, file, self.mesh)
        try:
            yield
        except BaseException:
            file.abandon()
            raise
        finally:
            recorder.stop()
        keep_weights(self.stages, file, self.mesh, self.settings.features)
        file.finish()
        problems = [problem for problem in gather_from_all(file.problem) if problem]
        if problems and self.mesh.rank == 0:
            logger.warning("step %d could not be captured: %s", step, problems[0])
        elif self.mesh.rank == 0:
            content = {
                "version": VERSION,
                "step": step,
                "samples": names,
                "world_size": self.mesh.world_size,
                "settings": kept_parts(self.settings),
            }
            write_json(folder / DESCRIPTION, {**self.description, **content})
            logger.info("captured step %d in %s", step, folder)

    def _picks(self, batches: Sequence[MicroBatch], file: RankFile) -> tuple[dict[int, list[Pick]], list[str]]:
        """The chosen samples on this rank by micro-batch, and the ids of all chosen ones."""
        unit = self.stages[0].shape.vision.merge_unit
        here = placed_samples(batches, unit)
        sizes = [size for sizes in gather_from_all([sample.size for sample in here]) for size in sizes]
        names = choose(sizes, self.settings.samples)
        picks: dict[int, list[Pick]] = {}
        for number, name in enumerate(names):
            sample = next((sample for sample in here if sample.sample_id == name), None)
            if sample is None:
                continue
            batch = batches[sample.batch]
            picks.setdefault(sample.batch, []).append(pick_rows(number, sample, batch, self.settings, unit))
            file.samples[name] = {
                "text": text_hash(sample, batch),
                "pixels": pixel_hash(sample, batch),
                "tokens": sample.tokens,
                "patches": sample.patches,
                **segments_of(sample, batch),
            }
        return picks, names
