"""What the processes of a benchmark are told, beside the config of the run."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from megatron_rb.data.mixes import Mix, mix_from_tree

SPEC_FILE = "spec.json"


@dataclass(frozen=True)
class BenchSpec:
    """How much is measured, and on what."""

    model: str
    """Its name in the result."""
    mix: Mix | None
    """None = the files of `data.train`."""
    steps: int = 20
    """Timed steps."""
    warmup: int = 3
    """Steps before them."""
    traced: int = 3
    """Steps after them whose passes are traced."""
    baseline: bool = False
    """Whether transformers' own step is timed too."""
    peak_tflops: float = 0.0
    """Peak that MFU is a share of; 0 = the published one, or a product measured on the device."""

    def __post_init__(self) -> None:
        least = {"steps": 1, "warmup": 1, "traced": 1, "peak_tflops": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {value}")

    def write(self, folder: Path) -> None:
        (folder / SPEC_FILE).write_text(json.dumps(dataclasses.asdict(self), indent=1))


def read_spec(folder: Path) -> BenchSpec:
    """What `BenchSpec.write` wrote."""
    tree = json.loads((folder / SPEC_FILE).read_text())
    return BenchSpec(**tree | {"mix": mix_from_tree(tree["mix"], SPEC_FILE) if tree["mix"] else None})
