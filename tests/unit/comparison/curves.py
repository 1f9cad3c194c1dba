"""Made-up loss curves and run folders."""

from pathlib import Path

import numpy as np

from megatron_rb.config.compose import save_config
from megatron_rb.config.schema import Config
from megatron_rb.metrics.jsonl import JsonlWriter
from tests.unit.metrics.records import step_record


def autocorrelated(draw: np.random.Generator, shape: tuple[int, int], rho: float) -> np.ndarray:
    """Rows of noise of variance 1 whose neighbours correlate by rho."""
    noise = draw.standard_normal(shape)
    for step in range(1, shape[1]):
        noise[:, step] = rho * noise[:, step - 1] + np.sqrt(1 - rho**2) * noise[:, step]
    return noise


def curve(steps: int) -> np.ndarray:
    """A loss that falls from 3 to about 1."""
    return 1.0 + 2.0 * np.exp(-np.arange(steps) / (steps / 6))


def pairs(draws: int, steps: int, *, batch: float, own: float, rho: float, offset: float, seed: int = 0) -> np.ndarray:
    """`[draws, 2, steps]`: pairs of curves that share the noise of their batches.

    Args:
        batch, own: standard deviation of the shared and of the own noise, relative to the loss.
        offset: B lies higher by this share.
    """
    draw = np.random.default_rng(seed)
    shared = batch * draw.standard_normal((draws, 1, steps))
    noise = own * np.stack([autocorrelated(draw, (draws, steps), rho) for _ in range(2)], axis=1)
    losses = curve(steps) * (1 + shared + noise)
    losses[:, 1] *= 1 + offset
    return losses


def write_run(folder: Path, losses: np.ndarray, config: Config | None = None, **changes) -> Path:
    """A run folder with these losses; further fields of the step records may be given."""
    writer = JsonlWriter(folder / "metrics.jsonl", 0)
    for step, loss in enumerate(losses.tolist(), 1):
        writer.write_step(step_record(step, loss=loss, **changes))
    writer.close()
    save_config(config or Config(), folder / "config.yaml")
    return folder
