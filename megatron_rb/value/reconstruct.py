"""Hops -> progress curves in [0, 1]: incremental, anchored at either end, fused, and the conservative update.

Source: Robo-Dopamine (arXiv 2512.23703), multi-perspective progress fusion and bi-directional consistency; its released
code has the first three without clamping. Every curve starts at 0 in the first frame and has one entry per frame.

An answer that could not be read is NaN and moves nothing: no hop, and an anchored curve keeps its last value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, isfinite, isnan

import numpy as np

METHODS = ("conservative", "fused", "incremental", "forward", "backward")


@dataclass(frozen=True)
class Consistency:
    """Weight w = exp(-alpha * d^2) of two anchored values that differ by d relative to their mean."""

    alpha: float = 20.0
    """The paper's value for LIBERO."""
    epsilon: float = 1e-6
    """Keeps the relative difference finite at a mean of zero; the paper's own number is not published."""

    def __post_init__(self) -> None:
        if not (isfinite(self.alpha) and self.alpha >= 0 and isfinite(self.epsilon) and self.epsilon > 0):
            raise ValueError(
                f"alpha {self.alpha:g} and epsilon {self.epsilon:g}; give an alpha of at least 0 and an epsilon above "
                f"0, else the weight leaves (0, 1] and progress its bounds"
            )

    def weight(self, forward: float, backward: float) -> float:
        """1 where both agree, towards 0 the more they differ; arguments in [0, 1]."""
        difference = abs(backward - forward) / ((forward + backward) / 2 + self.epsilon)
        return exp(-self.alpha * difference * difference)


def clean_hops(hops: Sequence[float] | np.ndarray) -> np.ndarray:
    """float64 copy in [-1, 1]; NaN becomes 0."""
    return np.clip(np.nan_to_num(np.asarray(hops, dtype=np.float64), nan=0.0, posinf=1.0, neginf=-1.0), -1.0, 1.0)


def incremental(hops: Sequence[float] | np.ndarray, start: float = 0.0) -> np.ndarray:
    """Phi_I of T + 1 frames from the T hops between neighbours: a gain takes its share of what is left, a loss of what
    is there. Stays in [0, 1]: it is a convex combination of the value before and of 1, or of the value before and of 0.

    Args:
        hops: H(s_t-1, s_t).
        start: value of the first frame.
    """
    value = min(max(float(start), 0.0), 1.0)
    curve = [value]
    for hop in clean_hops(hops).tolist():
        value += (1.0 - value) * hop if hop >= 0.0 else value * hop
        value = 0.0 if value < 0.0 else 1.0 if value > 1.0 else value
        curve.append(value)
    return np.array(curve)


def forward_anchored(hops: Sequence[float] | np.ndarray) -> np.ndarray:
    """Phi_F(t) = H(s_init, s_t), clamped; `hops` [T] are those from the first frame to frames 1 .. T."""
    return _kept(np.asarray(hops, dtype=np.float64))


def backward_anchored(hops: Sequence[float] | np.ndarray) -> np.ndarray:
    """Phi_B(t) = 1 + H(s_goal, s_t), clamped; `hops` [T] are those from the goal to frames 1 .. T."""
    return _kept(1.0 + np.asarray(hops, dtype=np.float64))


def fused(steps: Sequence[float], from_start: Sequence[float], from_goal: Sequence[float]) -> np.ndarray:
    """Phi*(t) = (Phi_I + Phi_F + Phi_B) / 3, where Phi_I goes on from Phi*(t - 1).

    Args:
        steps: [T] hops between neighbouring frames.
        from_start: [T] hops from the first frame to frames 1 .. T.
        from_goal: [T] hops from the goal to frames 1 .. T.
    """
    forward, backward = _anchors(steps, from_start, from_goal)
    value, curve = 0.0, [0.0]
    for hop, ahead, back in zip(clean_hops(steps).tolist(), forward, backward, strict=True):
        moved = value + ((1.0 - value) * hop if hop >= 0.0 else value * hop)
        value = (moved + ahead + back) / 3.0
        value = 0.0 if value < 0.0 else 1.0 if value > 1.0 else value
        curve.append(value)
    return np.array(curve)


def conservative(
    steps: Sequence[float],
    from_start: Sequence[float],
    from_goal: Sequence[float],
    consistency: Consistency | None = None,
) -> np.ndarray:
    """Phi*(t) = Phi*(t-1) + w_t / 2 * (mean(Phi_F, Phi_B) - Phi*(t-1) + dPhi); arguments as for `fused`.

    Where both anchors agree (w = 1) this is the mean of the anchors' mean and of Phi_I; where they contradict each
    other (w -> 0) progress stands still. Bounded because it equals (1 - w) Phi* + w/2 mean + w/2 Phi_I.
    """
    rule = consistency or Consistency()
    alpha, epsilon = rule.alpha, rule.epsilon
    forward, backward = _anchors(steps, from_start, from_goal)
    value, curve = 0.0, [0.0]
    for hop, ahead, back in zip(clean_hops(steps).tolist(), forward, backward, strict=True):
        mean = (ahead + back) / 2.0
        difference = (back - ahead) / (mean + epsilon)
        change = (1.0 - value) * hop if hop >= 0.0 else value * hop
        value += 0.5 * exp(-alpha * difference * difference) * (mean - value + change)
        value = 0.0 if value < 0.0 else 1.0 if value > 1.0 else value
        curve.append(value)
    return np.array(curve)


def reconstruct(
    method: str,
    steps: Sequence[float],
    from_start: Sequence[float],
    from_goal: Sequence[float],
    consistency: Consistency | None = None,
) -> np.ndarray:
    """The curve [T + 1] of one of `METHODS`; those that use fewer hops leave the others alone."""
    if method == "conservative":
        return conservative(steps, from_start, from_goal, consistency)
    if method == "fused":
        return fused(steps, from_start, from_goal)
    if method == "incremental":
        return incremental(steps)
    if method in ("forward", "backward"):
        return forward_anchored(from_start) if method == "forward" else backward_anchored(from_goal)
    raise ValueError(f"method '{method}' is not known; use {', '.join(METHODS)}")


class OnlineProgress:
    """The same curves one frame at a time, for a robot that does not know yet how its episode goes on."""

    def __init__(self, method: str = "conservative", consistency: Consistency | None = None) -> None:
        if method not in METHODS:
            raise ValueError(f"method '{method}' is not known; use {', '.join(METHODS)}")
        self.method = method
        self.consistency = consistency or Consistency()
        self.value = 0.0
        """Progress of the frame seen last."""
        self._forward = 0.0
        self._backward = 0.0

    def update(self, step: float, from_start: float = float("nan"), from_goal: float = float("nan")) -> float:
        """Take in the hops to the next frame from the frame before, from the first frame and from the goal.

        Returns:
            Progress of the new frame.
        """
        self._forward = self._forward if isnan(from_start) else _clamp(from_start)
        self._backward = self._backward if isnan(from_goal) else _clamp(1.0 + from_goal)
        hop = 0.0 if isnan(step) else min(max(step, -1.0), 1.0)
        change = (1.0 - self.value) * hop if hop >= 0 else self.value * hop
        self.value = _clamp(self._next(change))
        return self.value

    def _next(self, change: float) -> float:
        if self.method == "forward":
            return self._forward
        if self.method == "backward":
            return self._backward
        if self.method == "incremental":
            return self.value + change
        if self.method == "fused":
            return (self.value + change + self._forward + self._backward) / 3.0
        weight = self.consistency.weight(self._forward, self._backward)
        mean = (self._forward + self._backward) / 2.0
        return self.value + 0.5 * weight * (mean - self.value + change)


def completion(curve: np.ndarray) -> str:
    """`success`, `partial` or `failure` of an episode by its progress curve [frames].

    Success: the last value is above 0.8 and the mean of the last third above 0.6; partial: the mean of the last third
    is at least 0.4 (Robo-Dopamine, completion label).
    """
    curve = np.asarray(curve, dtype=np.float64)
    late = float(curve[-max(1, len(curve) // 3) :].mean())
    if curve[-1] > 0.8 and late > 0.6:
        return "success"
    return "partial" if late >= 0.4 else "failure"


def _anchors(
    steps: Sequence[float], from_start: Sequence[float], from_goal: Sequence[float]
) -> tuple[list[float], list[float]]:
    if not len(steps) == len(from_start) == len(from_goal):
        raise ValueError(
            f"{len(steps)} hops between neighbours, {len(from_start)} from the start and {len(from_goal)} from the "
            f"goal; give one of each per frame after the first"
        )
    return forward_anchored(from_start)[1:].tolist(), backward_anchored(from_goal)[1:].tolist()


def _kept(values: np.ndarray) -> np.ndarray:
    """Clamped to [0, 1] behind a 0 for the first frame; NaN repeats the value before it."""
    curve = np.clip(np.append(0.0, values), 0.0, 1.0)
    known = np.maximum.accumulate(np.where(np.isnan(curve), 0, np.arange(len(curve))))
    return curve[known]


def _clamp(value: float) -> float:
    return min(max(value, 0.0), 1.0)
