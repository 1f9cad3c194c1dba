"""From settings to what the processes of a rehearsal read."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from megatron_rb.config.compose import CONFIG_FILE, load_config, save_config
from megatron_rb.config.derive import Derived, derive, replica_size
from megatron_rb.config.schema import Config
from megatron_rb.data.mixes import Mix, load_mix
from megatron_rb.layout import PipelineLayout
from megatron_rb.layout.mesh import RankGrid
from megatron_rb.planner.device import Device, load_device
from megatron_rb.planner.histogram import load_histogram
from megatron_rb.platform.rehearsal import MusaRehearsalPlatform, RehearsalPlatform
from megatron_rb.rehearsal.device import DataSheet
from megatron_rb.rehearsal.job import RUN_FOLDER, RehearsalJob
from megatron_rb.rehearsal.packages.catalogue import packages_asked
from megatron_rb.rehearsal.ranks import ranks_asked
from megatron_rb.rehearsal.samples import UnpaintedSamples
from megatron_rb.shapes.balance import default_layout
from megatron_rb.shapes.published import BASES, CONFIGS, absent_name, shape_of
from megatron_rb.shapes.shape import RoboBrainShape

USUAL_MIX, SMALL_MIX = "images_16k", "tiny"
"""Samples where none are named: of RoboBrain's stages, and for budgets that those do not fit."""
USUAL_LENGTH = 8192
USUAL_DEVICES = {"cuda": "h200", "musa": "mtt_s5000"}
REHEARSED_AS = {"cuda": RehearsalPlatform.name, "musa": MusaRehearsalPlatform.name}
"""Platforms that can be rehearsed, and the one that stands in for each."""
PACKAGES_FOR = "cuda"
"""The platform whose packages are stood in for."""
MODEL_FOLDER = "model"
OTHER_ARCHITECTURES = {"A800": (8, 0), "A100": (8, 0), "S4000": (2, 2), "S5000": (3, 1)}
"""Compute capability by a word of the device's name; NVIDIA's of today have 9.0."""
MULTIPROCESSORS = {(8, 0): 108, (9, 0): 132, (2, 2): 48, (3, 1): 48}
"""Those of Moore Threads are not published; nothing that is rehearsed asks for them."""


@dataclass(frozen=True)
class RehearsalRequest:
    """The options of `rb rehearse`."""

    settings: tuple[str, ...]
    ranks: str = "classes"
    mix: str = ""
    steps: int = 1
    micro_batches: int = 0
    """Of a step and copy of the model; 0 = as the settings say."""
    device: str = ""
    histogram: str = ""
    """Sizes of samples, as `rb data stats` writes them, in place of a mix."""
    evaluation: bool = False
    """Evaluate after the steps."""
    checkpoint: bool = False
    """Save and load a checkpoint after that."""
    compiled: bool = True
    """Compile the Triton kernels that are started."""
    packages: str = ""
    """Of the cluster, as `flash_attn=2.8.3,transformer_engine`; empty = those that are installed here."""


@dataclass(frozen=True)
class Rehearsal:
    """What is rehearsed."""

    folder: Path
    """Holds the settings of the run, and what the rehearsed ranks write."""
    config: Config
    shape: RoboBrainShape
    grid: RankGrid
    layout: PipelineLayout
    device: Device
    mix: Mix
    ranks: tuple[int, ...]
    request: RehearsalRequest
    packages: dict[str, str]
    """Releases that are stood in for, by name."""

    def job(self, ranks: list[int]) -> RehearsalJob:
        """What one process rehearses."""
        request = self.request
        return RehearsalJob(
            self.config.name,
            ranks,
            self.grid.world_size,
            request.steps,
            self.mix,
            data_sheet(self.device),
            str(Path(request.histogram).absolute()) if request.histogram else "",
            request.evaluation,
            request.checkpoint,
            request.compiled,
            self.device.platform,
            self.packages,
        )


def prepare(request: RehearsalRequest, folder: Path) -> Rehearsal:
    """Check the settings and write the run that the processes read into `folder`.

    Raises:
        ValueError: settings, packages, mix, device or ranks do not fit.
    """
    packages = packages_asked(request.packages)
    config = load_config(list(request.settings))
    if config.platform.name not in ("auto", "cpu", *REHEARSED_AS):
        raise ValueError(
            f"platform {config.platform.name} cannot be rehearsed, only {' and '.join(REHEARSED_AS)} can; "
            "add platform=cuda"
        )
    shape = shape_of(config.model.hf_path, config.model.published)
    device = _device(request, config)
    if packages and device.platform != PACKAGES_FOR:
        raise ValueError(
            f"{next(iter(packages))} has no release for {device.platform} that could be stood in for; "
            "rehearse --with none"
        )
    if device.memory <= device.reserved_memory:
        raise ValueError(
            f"{device.name} has {device.memory / 1e9:g} GB, of which its libraries take "
            f"{device.reserved_memory / 1e9:g} (reserved_memory); nothing is left to rehearse with"
        )
    if request.mix and request.histogram:
        raise ValueError(f"--mix {request.mix} and --data {request.histogram} are two kinds of samples; give one")
    mix = _mix(request.mix, config)
    config = _as_rehearsed(config, request, folder, mix, REHEARSED_AS[device.platform])
    derived = derive(config, shape)
    parallel = config.parallel
    grid = RankGrid.of_world(derived.world_size, parallel.tp_size, parallel.pp_size, parallel.cp_size)
    layout = derived.layout or default_layout(shape, derived.pp_size)
    ranks = tuple(ranks_asked(request.ranks, grid))
    histogram = load_histogram(request.histogram) if request.histogram else None
    UnpaintedSamples(mix, shape, histogram)  # what does not fit is said now
    _write(config, derived, folder)
    return Rehearsal(folder, config, shape, grid, layout, device, mix, ranks, request, packages)


def _device(request: RehearsalRequest, config: Config) -> Device:
    """The device that is asked for; else the first of the recipe, or the usual one, of the platform.

    Raises:
        ValueError: it is one of another platform than the run asks for, or of one that cannot be rehearsed.
    """
    asked = config.platform.name if config.platform.name in REHEARSED_AS else ""
    named = request.device or config.planner.device
    known = [load_device(name) for name in ([named] if named else config.recipe.devices)]
    fitting = [device for device in known if device.platform == asked or not asked and device.platform in REHEARSED_AS]
    if fitting:
        return fitting[0]
    if named:
        raise ValueError(
            f"{known[0].name} is a device of platform {known[0].platform}, and "
            f"{f'the run asks for platform {asked}' if asked else 'it cannot be rehearsed'}; name another with --device"
        )
    return load_device(USUAL_DEVICES[asked or "cuda"])


def data_sheet(device: Device) -> DataSheet:
    """What torch.cuda says of a device."""
    capability = next((c for word, c in OTHER_ARCHITECTURES.items() if word in device.name), (9, 0))
    return DataSheet(device.name, capability, int(device.memory), MULTIPROCESSORS[capability])


def _mix(name: str, config: Config) -> Mix:
    """The mix, packed as the settings say."""
    mix = load_mix(name or (USUAL_MIX if config.data.seq_length >= USUAL_LENGTH else SMALL_MIX))
    return dataclasses.replace(mix, seq_length=config.data.seq_length, max_patches=config.data.max_patches)


def _as_rehearsed(config: Config, request: RehearsalRequest, folder: Path, mix: Mix, platform: str) -> Config:
    """The same run on the rehearsal's platform, in its folder, with its samples, writing no curves."""
    world_size = config.world_size or config.cluster.nodes * config.cluster.processes_per_node
    data = dataclasses.replace(config.data, train=[f"mix {mix.name}"], evaluation=[])
    if request.micro_batches:
        copies = max(1, (world_size or replica_size(config.parallel)) // replica_size(config.parallel))
        data = dataclasses.replace(data, global_micro_batches=request.micro_batches * copies)
    quiet = dataclasses.replace(
        config.metrics, progress=False, tensorboard=False, plots=False, compare_ranks_every=0, log_every=10**6
    )
    return dataclasses.replace(
        config,
        world_size=world_size,
        run_dir=str(folder / RUN_FOLDER),
        platform=dataclasses.replace(config.platform, name=platform, threads_per_rank=1),
        data=data,
        metrics=quiet,
        # Base weights of adapters are never random; where they lie does not matter here.
        checkpoint=dataclasses.replace(
            config.checkpoint, init="" if config.model.adapters else "random", dir="", resume=True
        ),
        # One more than are taken, so that no step is the last one.
        schedule=dataclasses.replace(config.schedule, train_steps=request.steps + 1),
        model=dataclasses.replace(config.model, hf_path=_model(config, folder)),
    )


def _model(config: Config, folder: Path) -> str:
    """The model's folder; for a published model that is not there one with its config.json."""
    name = absent_name(config.model.hf_path, config.model.published)
    if not name:
        return str(Path(config.model.hf_path).absolute())
    made = folder / MODEL_FOLDER
    made.mkdir(parents=True)
    (made / "config.json").write_text(json.dumps(CONFIGS[BASES.get(name, name)]), encoding="utf-8")
    return str(made)


def _write(config: Config, derived: Derived, folder: Path) -> None:
    (folder / RUN_FOLDER).mkdir(parents=True, exist_ok=True)
    save_config(config, folder / RUN_FOLDER / CONFIG_FILE)
