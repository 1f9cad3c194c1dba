"""From a config to a planning task, and from a plan back to a config; imports no torch."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_rb.app.fitting import device_of_run
from megatron_rb.app.forecast import stage_forecast
from megatron_rb.app.trained import trained_of
from megatron_rb.config.compose import keys_of
from megatron_rb.config.derive import Derived
from megatron_rb.config.optimizers import OPTIMIZERS, check_optimizer
from megatron_rb.config.rules import either
from megatron_rb.config.schema import Config, DataConfig
from megatron_rb.data.build import build_dataset, build_encoder
from megatron_rb.data.ledger import Ledger
from megatron_rb.data.packing import Budget, plan_step
from megatron_rb.data.stats import sample_histogram
from megatron_rb.planner.calibration import load_calibration
from megatron_rb.planner.cost import Pricing
from megatron_rb.planner.device import Device, beyond, device_names, load_device, with_memory
from megatron_rb.planner.histogram import Histogram, load_histogram
from megatron_rb.planner.kept import operators_of
from megatron_rb.planner.predict import Prediction
from megatron_rb.planner.report import details, memory_lines, mode_line
from megatron_rb.planner.report import settings as settings_of
from megatron_rb.planner.search import plan
from megatron_rb.planner.task import PlanTask
from megatron_rb.planner.workload import MicroBatchSampler
from megatron_rb.shapes.published import shape_of
from megatron_rb.shapes.shape import RoboBrainShape, load_shape


@dataclass(frozen=True)
class Request:
    """What `rb plan` was asked."""

    device: Device
    gpus: int
    histogram: Histogram
    shape: RoboBrainShape
    config: Config
    calibration: str = ""
    asked: dict[str, int] = field(default_factory=dict)
    note: str = ""
    """What its user should know beside the plan."""


def read_histogram(config: Config, ledger: Path, *, progress: bool) -> Histogram:
    """Look at every row of `data.train`; rows that training would refuse are lines of the ledger.

    Raises:
        ValueError: there is no usable row, or no tokenizer.
    """
    if not config.data.train:
        raise ValueError("data.train is empty; name at least one jsonl file of conversations")
    encoder = build_encoder(config.data, config.model.hf_path, load_shape(config.model.hf_path))
    ledger.unlink(missing_ok=True)  # of an earlier look at the rows
    with Ledger(ledger) as book:
        dataset = build_dataset(config.data, encoder, config.data.train, book, progress=progress)
    if not ledger.stat().st_size:
        ledger.unlink()
    histogram = sample_histogram(dataset)
    dataset.close()
    return histogram


def describe_histogram(histogram: Histogram) -> str:
    """A line on what the samples are like."""
    count, text, patches = histogram.num_samples, histogram.text_tokens, histogram.patches
    with_images = histogram.counts[patches > 0].sum() / count
    return (
        f"{count} samples, text tokens mean {text @ histogram.counts / count:.0f} max {text.max()}, "
        f"patches mean {patches @ histogram.counts / count:.0f} max {patches.max()}, {with_images:.0%} with images"
    )


LEFT_TO_A_PLAN = (
    "model.recompute",
    "parallel.layout",
    "parallel.tp_size",
    "parallel.pp_size",
    "parallel.cp_size",
    "parallel.sequence_parallel",
)
"""Settings that a plan takes the place of, whatever a recipe says of them."""


def check_left_to_plan(config: Config, words: Sequence[str]) -> None:
    """Raise ValueError for a setting that was given by hand and that `parallel=auto` would replace.

    Args:
        words: settings of the command line.
    """
    keys = [key for word in words for key in keys_of(word)] if config.parallel.auto else []
    replaced = [key for key in keys if any(f"{key}.".startswith(f"{name}.") for name in LEFT_TO_A_PLAN)]
    if replaced:
        raise ValueError(
            f"parallel=auto plans {replaced[0]} itself; leave that out, or give the whole layout without parallel=auto"
        )


def maybe_plan(config: Config) -> Config:
    """With `parallel=auto`, the same run with the fastest layout that is found; else the run as it is.

    Raises:
        ValueError: what has to be known for a plan is not, or nothing fits.
    """
    if not config.parallel.auto:
        return config
    gpus = config.world_size or config.cluster.nodes * config.cluster.processes_per_node
    if not gpus:
        raise ValueError(
            "parallel=auto needs to know how many processes there are; give world_size=..., or cluster.nodes and "
            "cluster.processes_per_node"
        )
    request = Request(
        _device_of(config),
        gpus,
        _histogram_of(config),
        shape_of(config.model.hf_path, config.model.published),
        config,
        config.planner.calibration,
        {"cp": 1} if config.metrics.capture.every else {},
    )
    task = build_task(request)
    best = plan(task)[0]
    print(f"parallel=auto: {mode_line(task)}: {best.degrees}, {best.step_seconds:.3f} s a step, MFU {best.mfu:.1%}")
    print("\n".join(details(best)), flush=True)
    return with_plan(config, task, best)


def _histogram_of(config: Config) -> Histogram:
    if config.planner.histogram:
        return load_histogram(config.planner.histogram)
    with tempfile.TemporaryDirectory(prefix="planning-") as folder:
        return read_histogram(config, Path(folder) / "ledger.jsonl", progress=sys.stderr.isatty())


def _device_of(config: Config) -> Device:
    name = config.planner.device or ("cpu" if config.platform.name == "cpu" else "")
    if not name:
        raise ValueError(
            f"parallel=auto needs to know the devices; give planner.device={either(device_names())}, or a yaml file"
        )
    device = load_device(name)
    memory = config.planner.max_memory or device.memory
    if beyond(device, memory):
        print(beyond(device, memory), file=sys.stderr, flush=True)
    return with_memory(device, memory)


def with_plan(config: Config, task: PlanTask, item: Prediction) -> Config:
    """A config with the settings of a planned choice."""
    tree = settings_of(task, item)
    recompute = dataclasses.replace(config.model.recompute, **tree["model"]["recompute"])
    return dataclasses.replace(
        config,
        world_size=tree["world_size"],
        model=dataclasses.replace(config.model, recompute=recompute),
        parallel=dataclasses.replace(config.parallel, auto=False, **tree["parallel"]),
        data=dataclasses.replace(config.data, **tree["data"]),
    )


def memory_forecast(config: Config, derived: Derived, shape: RoboBrainShape) -> list[str]:
    """Predicted peak memory of every pipeline rank, in lines.

    Memory follows from sizes alone; only the share of context and libraries is the device's, when it is known.
    """
    known = device_of_run(config) or (load_device("cpu") if config.platform.name == "cpu" else None)
    reserved = known.reserved_memory if known else 0.0
    stages = stage_forecast(config, derived, shape, known.platform if known else "cuda", reserved)
    without = "" if known else ", without what context and libraries take (give planner.device)"
    full = f"when a micro-batch is full ({config.data.seq_length} tokens, {config.data.max_patches} patches)"
    head = f"predicted peak memory of a rank by pipeline stage {full}, not a measurement{without}"
    return [head, *memory_lines(stages)]


def build_task(request: Request) -> PlanTask:
    """The planning task of a request.

    Raises:
        ValueError: settings that no run may have.
    """
    config = request.config
    check_optimizer(config)
    parallel = config.parallel
    calibration = load_calibration(request.calibration) if request.calibration else None
    if calibration is not None:
        calibration.check(request.device.name, config.model.dtype)
    merge_unit = request.shape.vision.merge_unit
    batch = samples_of_a_step(config.data, request.histogram, merge_unit)
    sampler = MicroBatchSampler(request.histogram, merge_unit, batch, pack, seed=config.seed)
    return PlanTask(
        model=request.shape,
        pricing=Pricing(request.device, config.model.dtype, calibration),
        gpus=request.gpus,
        sampler=sampler,
        seq_length=config.data.seq_length,
        max_patches=config.data.max_patches,
        frozen=trained_of(config.model, request.shape),
        optimizer=OPTIMIZERS[config.optimizer.name],
        operators=operators_of(config.kernels, request.device.platform),
        distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        asked=request.asked,
        padding_buckets=_padding_buckets(config, request.device),
        global_micro_batches=config.data.global_micro_batches,
    )


def samples_of_a_step(data: DataConfig, histogram: Histogram, merge_unit: int) -> int:
    """Samples of a step; when it is counted in micro-batches, as many as fill them on average."""
    if not data.global_micro_batches:
        return data.global_batch_size
    share = histogram.counts / histogram.num_samples
    fill = max(share @ histogram.tokens(merge_unit) / data.seq_length, share @ histogram.patches / data.max_patches)
    return max(1, int(data.global_micro_batches / fill))


def _padding_buckets(config: Config, device: Device) -> int:
    """As training decides it, for the device that is planned for."""
    on_cpu = device.name == load_device("cpu").name or config.platform.name == "cpu"
    padded = config.data.padding == "buckets" or (config.data.padding == "auto" and not on_cpu)
    return config.data.padding_buckets if padded else 0


def pack(sizes: np.ndarray, tokens: int, patches: int, ranks: int, multiple: int) -> list[list[list[int]]]:
    """The packing of training."""
    return plan_step(sizes, Budget(tokens, patches), ranks, multiple)
