"""What a process of `rb rehearse` is told."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_rb.data.mixes import Mix, mix_from_tree
from megatron_rb.rehearsal.device import DataSheet

JOB_FILE, RUN_FOLDER = "job.json", "run"


@dataclass(frozen=True)
class RehearsalJob:
    """What a worker is to rehearse; the settings of the run lie in its `run` folder."""

    name: str
    """Of the run."""
    ranks: list[int]
    world_size: int
    steps: int
    mix: Mix
    device: DataSheet
    histogram: str = ""
    """File with the sizes of samples, drawn in place of those of the mix; empty = the mix."""
    evaluation: bool = False
    """Evaluate after the steps."""
    checkpoint: bool = False
    """Save and load a checkpoint after that."""
    compiled: bool = True
    """Compile the Triton kernels that were started."""
    device_type: str = "cuda"
    """`cuda` or `musa`."""
    packages: dict[str, str] = field(default_factory=dict)
    """Releases that are stood in for, by name."""

    def write(self, folder: Path) -> None:
        (folder / JOB_FILE).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> RehearsalJob:
        tree: dict[str, Any] = json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))
        mix, device = tree.pop("mix"), tree.pop("device")
        device["capability"] = tuple(device["capability"])
        return cls(**tree, mix=mix_from_tree(mix, JOB_FILE), device=DataSheet(**device))
