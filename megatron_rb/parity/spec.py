"""What the processes of a parity run agree on, and the settings they run with."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_rb.config.compose import CONFIG_FILE, save_config
from megatron_rb.config.schema import Config, ModelConfig, ParallelConfig
from megatron_rb.data.sample import EncodedSample

SPEC, SAMPLES = "spec.json", "samples.pickle"


@dataclass(frozen=True)
class ParitySpec:
    """What is run, beside the settings."""

    weights: str
    """Where the stack takes its weights from: a checkpoint, or the Hugging Face folder."""
    grads: bool

    def write(self, folder: Path, samples: Sequence[EncodedSample], config: Config) -> None:
        (folder / SPEC).write_text(json.dumps(asdict(self)))
        (folder / SAMPLES).write_bytes(pickle.dumps(list(samples)))
        save_config(config, folder / CONFIG_FILE)


def read_spec(folder: Path) -> tuple[ParitySpec, list[EncodedSample]]:
    """What `ParitySpec.write` wrote of the spec and the samples."""
    spec = ParitySpec(**json.loads((folder / SPEC).read_text()))
    return spec, pickle.loads((folder / SAMPLES).read_bytes())


def parity_config(hf_path: str, parallel: ParallelConfig) -> Config:
    """Settings under which numbers can be compared to the last digits: fp32 and the layers that every platform has."""
    replica = parallel.tp_size * parallel.pp_size * parallel.cp_size
    return Config(world_size=replica, model=ModelConfig(hf_path, dtype="fp32", layers="local"), parallel=parallel)
