"""What is measured in a step and in an evaluation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step; counts are summed over all data-parallel ranks."""

    step: int
    """Optimizer steps done, this one included: the first record of a run has step 1."""
    epoch: int
    loss: float
    """Cross entropy per label; NaN for a step without a single label."""
    grad_norm: float | None
    """Global norm before clipping; None when it was not computed."""
    learning_rates: dict[str, float]
    """By module: `vision`, `merger`, `language`."""
    loss_scale: float
    num_tokens: int
    num_labels: int
    num_patches: int
    num_samples: int
    seconds: float
    """Wall clock of the whole step, waiting for data included."""
    data_wait_seconds: float
    memory_bytes: int | None
    """Peak memory of the device; None where it is not known."""
    flops: float = 0.0
    """Floating-point operations that forward and backward pass need at least, ViT included, over all devices: real rows
    only, nothing for what is computed again or for frozen weights."""
    devices: int = 1
    peak_flops: float | None = None
    """Per second and device, what MFU is a share of; None where it is not known."""
    skipped_updates: int = 0
    """Updates of the run so far that were skipped, this step's included: loss or gradient norm was not finite, or there
    was nothing to learn."""

    @property
    def tokens_per_second(self) -> float:
        return _rate(self.num_tokens, self.seconds)

    @property
    def patches_per_second(self) -> float:
        return _rate(self.num_patches, self.seconds)

    @property
    def tflops(self) -> float:
        """TFLOP/s of a device."""
        return _rate(self.flops, self.seconds) / self.devices / 1e12

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilization, 0..1."""
        return self.tflops * 1e12 / self.peak_flops if self.peak_flops else None

    @property
    def data_wait_share(self) -> float:
        """Part of the step that was spent waiting for data, 0..1."""
        return _rate(self.data_wait_seconds, self.seconds)


@dataclass(frozen=True)
class EvalRecord:
    """One evaluation of the weights after `step` optimizer steps."""

    step: int
    values: dict[str, float]
    """Measure by name, e.g. `loss`."""


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0
