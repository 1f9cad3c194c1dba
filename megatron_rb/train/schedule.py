"""The learning rate of every step: linear warm-up, then cosine, linear or constant decay, per part of the model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron.core.optimizer import MegatronOptimizer

from megatron_rb.config.schema import OptimizerConfig, ScheduleConfig
from megatron_rb.models.build import MODEL_PARTS
from megatron_rb.train.optimizers import OPTIMIZERS, lr_ratio

DECAYS = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class LearningRateCurve:
    """Share of the way from minimum to maximum learning rate, as a function of the step."""

    train_steps: int
    warmup_steps: int
    decay: str

    def __post_init__(self) -> None:
        if self.decay not in DECAYS:
            raise ValueError(f"schedule.decay {self.decay!r} is unknown; use {', '.join(DECAYS)}")
        if self.train_steps < 1:
            raise ValueError(f"a run needs at least one step, not {self.train_steps}")
        if not 0 <= self.warmup_steps <= self.train_steps:
            raise ValueError(f"{self.warmup_steps} warm-up steps do not fit into {self.train_steps} steps")

    def learning_rate(self, step: int, max_lr: float, min_lr: float) -> float:
        """Learning rate of the update that follows `step` finished ones.

        It rises in `warmup_steps` equal parts to max_lr; the update after `train_steps` would have min_lr.
        """
        if step < self.warmup_steps:
            return max_lr * (step + 1) / self.warmup_steps
        if self.decay == "constant":
            return max_lr
        decay_steps = max(1, self.train_steps - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / decay_steps)
        remaining = 1.0 - progress if self.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
        return min_lr + (max_lr - min_lr) * remaining


class LearningRateSchedule:
    """Sets learning rate and weight decay of the optimizer's groups; `step` counts finished updates.

    The values come from the configuration of the running process, also after a checkpoint is loaded: a resumed run
    with other settings follows the new ones from its step on.
    """

    def __init__(
        self, optimizer: MegatronOptimizer, settings: OptimizerConfig, schedule: ScheduleConfig, train_steps: int
    ) -> None:
        if settings.min_lr > settings.lr:
            raise ValueError(f"optimizer.min_lr {settings.min_lr} is larger than optimizer.lr {settings.lr}")
        if not 0.0 <= schedule.warmup_ratio <= 1.0:
            raise ValueError(f"schedule.warmup_ratio {schedule.warmup_ratio} is not between 0 and 1")
        warmup_steps = math.ceil(schedule.warmup_ratio * train_steps)
        self.curve = LearningRateCurve(train_steps, warmup_steps, schedule.decay)
        self.finished_steps = 0
        self._optimizer = optimizer
        self._settings = settings
        self._apply()

    def step(self) -> None:
        """One more update is finished."""
        self.finished_steps += 1
        self._apply()

    def learning_rates(self) -> dict[str, float]:
        """Learning rate of the next update by model part, the same on every rank."""
        return {part: self._learning_rate(lr_ratio(self._settings, part)) for part in MODEL_PARTS}

    def state_dict(self) -> dict[str, Any]:
        return {"finished_steps": self.finished_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.finished_steps = state["finished_steps"]
        self._apply()

    def _learning_rate(self, ratio: float) -> float:
        settings = self._settings
        return self.curve.learning_rate(self.finished_steps, settings.lr * ratio, settings.min_lr * ratio)

    def _apply(self) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate(group["lr_mult"])
            group["weight_decay"] = self._settings.weight_decay * group["wd_mult"]
            group.update(OPTIMIZERS[self._settings.name].group(self._settings))
