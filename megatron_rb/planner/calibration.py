"""Measured times of single blocks: how they correct what the figures of a device predict."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = "megatron-rb block times"


@dataclass(frozen=True)
class Curve:
    """Measured over nominal time, by nominal time; in between it is interpolated over the logarithm of time."""

    nominal: tuple[float, ...]
    """Seconds, rising."""
    measured: tuple[float, ...]
    """Seconds."""

    def factor(self, nominal: np.ndarray) -> np.ndarray:
        """Correction for nominal times; outside the measured range that of its nearest end."""
        known = np.log(np.array(self.nominal))
        ratio = np.log(np.array(self.measured) / np.array(self.nominal))
        return np.exp(np.interp(np.log(np.maximum(nominal, 1e-12)), known, ratio))


@dataclass(frozen=True)
class Calibration:
    """What `rb bench blocks` has measured on a device."""

    device: str
    """Hardware and versions, in words."""
    dtype: str
    nominal_device: str
    """Name of the device description that the nominal times were computed with; the factors belong to it."""
    curves: dict[str, Curve]
    """By `PART.forward` and `PART.backward`."""

    def correct(self, part: str, direction: str, nominal: np.ndarray) -> np.ndarray:
        """Nominal times as they would be measured; a part that was not measured keeps its nominal time."""
        curve = self.curves.get(f"{part}.{direction}")
        return nominal if curve is None else nominal * curve.factor(nominal)

    def check(self, nominal_device: str, dtype: str) -> None:
        """
        Raises:
            ValueError: the calibration is of another device description or dtype.
        """
        if nominal_device != self.nominal_device or dtype != self.dtype:
            raise ValueError(
                f"the calibration is for '{self.nominal_device}' in {self.dtype}, the plan is for '{nominal_device}' "
                f"in {dtype}; run `rb bench blocks` there, or plan without calibration"
            )

    def save(self, path: Path) -> None:
        """Write a json file, whole or not at all."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "version": 1,
            "device": self.device,
            "dtype": self.dtype,
            "nominal_device": self.nominal_device,
            "curves": {
                name: {"nominal_seconds": list(curve.nominal), "measured_seconds": list(curve.measured)}
                for name, curve in self.curves.items()
            },
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(content, indent=1))
        partial.replace(path)


def load_calibration(path: str | Path) -> Calibration:
    """Read what `save` wrote.

    Raises:
        ValueError: the file is missing or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no calibration {path}; `rb bench blocks` writes one")
    try:
        content = json.loads(path.read_text())
        curves = {
            name: Curve(tuple(map(float, item["nominal_seconds"])), tuple(map(float, item["measured_seconds"])))
            for name, item in content["curves"].items()
        }
        return Calibration(content["device"], content["dtype"], content["nominal_device"], curves)
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no calibration ({error}); `rb bench blocks` writes one") from error
