"""From a request to a folder with all that the processes of a benchmark read; nothing starts here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_rb.bench.train.spec import BenchSpec
from megatron_rb.checkpoint.hf.folder import PICKLED, SAFETENSORS
from megatron_rb.checkpoint.hf.training import write_benchmark_model, write_random_weights
from megatron_rb.config.compose import CONFIG_FILE, load_config, save_config
from megatron_rb.config.derive import Derived, derive, replica_size
from megatron_rb.config.schema import Config
from megatron_rb.data.mixes import load_mix
from megatron_rb.data.mock_samples import MockSamples
from megatron_rb.platform import get_platform
from megatron_rb.shapes.families import FAMILIES, NEWEST
from megatron_rb.shapes.published import CONFIGS
from megatron_rb.shapes.shape import load_shape

SMALL = {f"small-{family}": family for family in FAMILIES}
MODELS = (*SMALL, *CONFIGS)
"""What `--model` takes: small models with random weights, and the sizes of the published ones."""
OF_THE_MIX = ("data.seq_length", "data.max_patches", "data.global_batch_size", "data.global_micro_batches")
MODEL_FOLDER = "model"


@dataclass(frozen=True)
class BenchRequest:
    """The options of `rb bench train`."""

    settings: tuple[str, ...]
    model: str
    mix: str
    steps: int
    warmup: int
    baseline: bool
    peak_tflops: float


@dataclass(frozen=True)
class Ready:
    """What is to be started."""

    processes: int
    threads: int
    """Of each process; 0 = an even share of the cores."""
    env: dict[str, str]
    """What platform and site want in the environment of every process."""


@contextmanager
def prepared(request: BenchRequest, folder: Path) -> Iterator[Ready]:
    """A folder with spec, config and, where none is given, a model; the model's weights go when the block ends.

    Raises:
        ValueError: settings, mix, model or folder do not fit.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; name a new folder with --out, or remove it")
    config = load_config([*_defaults(request.settings), *request.settings])
    on_cpu = get_platform(config.platform.name).name == "cpu"
    if on_cpu and not any(word.startswith(("model.dtype", "experiment")) for word in request.settings):
        config.model.dtype = "fp32"  # CPUs without bf16 units convert every value
    # Settings that name a model win over the default one.
    names_model = any(
        word.startswith(("model", "experiment")) and not word.startswith("model.dtype") for word in request.settings
    )
    model = request.model or ("" if names_model else f"small-{NEWEST}" if on_cpu else "RoboBrain2.0-3B")
    mix_name = request.mix or ("" if config.data.train else "tiny" if on_cpu else "images_8k")
    spec = BenchSpec(
        model=Path(model or config.model.hf_path).name,
        mix=load_mix(mix_name) if mix_name else None,
        steps=request.steps,
        warmup=request.warmup,
        baseline=request.baseline,
        peak_tflops=request.peak_tflops,
    )
    config = _for_mix(config, spec, request.settings)
    if request.baseline and _processes(config) > 1:
        raise ValueError(
            f"--baseline hf runs transformers' step in one process, the settings ask for {_processes(config)}; "
            f"use parallel=one_process, or leave the baseline out"
        )
    config.run_dir = str(folder / "run")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _give_model(config, model, folder / MODEL_FOLDER, request.baseline)
        derived = _step_size(config, spec)
        if spec.mix is not None:
            MockSamples(spec.mix, load_shape(config.model.hf_path))  # a mix that does not fit is said now
        save_config(config, folder / CONFIG_FILE)
        spec.write(folder)
        yield Ready(derived.world_size, config.platform.threads_per_rank, config.platform.env | config.cluster.env)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        shutil.rmtree(folder / MODEL_FOLDER, ignore_errors=True)


def _defaults(settings: Sequence[str]) -> list[str]:
    """One process unless something else is said."""
    spread = ("parallel", "experiment", "world_size", "cluster")
    return [] if any(word.startswith(spread) for word in settings) else ["parallel=one_process"]


def _for_mix(config: Config, spec: BenchSpec, settings: Sequence[str]) -> Config:
    if spec.mix is None:
        return config
    own = [word for word in settings if word.split("=")[0] in OF_THE_MIX]
    if own:
        raise ValueError(
            f"{own[0]} belongs to the mix '{spec.mix.name}', so that results of one mix can be compared; write a mix "
            f"file of your own (a result.json names all its fields) and give it with --mix"
        )
    if config.data.train:
        raise ValueError(f"--mix {spec.mix.name} and data.train are both given; leave one of them out")
    data = replace(config.data, seq_length=spec.mix.seq_length, max_patches=spec.mix.max_patches)
    return replace(config, data=data)


def _step_size(config: Config, spec: BenchSpec) -> Derived:
    """Set the micro-batches of a step from the mix, whose figure is per data-parallel rank."""
    shape = load_shape(config.model.hf_path)
    if spec.mix is not None:
        copies = _processes(config) // replica_size(config.parallel)
        config.data.global_micro_batches = spec.mix.micro_batches * max(1, copies)
    return derive(config, shape)


def _processes(config: Config) -> int:
    """Processes that the settings ask for."""
    asked = config.world_size or config.cluster.nodes * config.cluster.processes_per_node
    return asked or replica_size(config.parallel)


def _give_model(config: Config, name: str, folder: Path, weights: bool) -> None:
    """Point the config to a model folder, made here when `name` is one of MODELS.

    Args:
        weights: the folder must hold weights, since two sides start from them.
    """
    if name in SMALL:
        write_benchmark_model(folder, SMALL[name])
    elif name in CONFIGS:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    elif name:
        folder = Path(name)
    else:
        folder = Path(config.model.hf_path)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"there is no config.json in {folder or 'model.hf_path'}; give a Hugging Face folder with --model, or one "
            f"of {', '.join(MODELS)} (sizes with random weights)"
        )
    config.model.hf_path = str(folder)
    has_weights = any((folder / file).is_file() for file in (*SAFETENSORS, *PICKLED))
    if weights and not has_weights:
        if name not in CONFIGS:
            raise ValueError(f"{folder} has no weights, which --baseline hf needs on both sides; add them")
        write_random_weights(folder, torch.bfloat16 if config.model.dtype == "bf16" else torch.float32)
        has_weights = True
    if not config.checkpoint.init:
        config.checkpoint.init = str(folder) if has_weights else "random"


def default_folder(moment: str) -> Path:
    """Where a result goes when nothing is said."""
    return Path("runs/bench") / moment
