"""The settings of a run that is there to be captured."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

from megatron_rb.config.schema import Config

CAPTURE = "megatron_rb.app.capture:capture"
"""What its processes run, on the folder of the run."""


def capture_config(config: Config, init: str, out: Path, steps: int) -> Config:
    """The same recipe, with each of its first steps captured below `out` and nothing else drawn or shown.

    Args:
        init: what the recipe starts from, as it was derived.
    """
    config = deepcopy(config)
    config.run_dir, config.checkpoint.dir, config.checkpoint.init = str(out / "run"), "", init
    capture, metrics = config.metrics.capture, config.metrics
    capture.every, capture.limit, capture.dir = 1, steps, str(out)
    metrics.tensorboard = metrics.plots = metrics.progress = False
    return config
