"""Task of a run from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from megatron_rb.config.derive import Derived
from megatron_rb.config.schema import Config
from megatron_rb.data.dataset import ConversationDataset
from megatron_rb.data.ledger import Ledger
from megatron_rb.data.loader import RankShare, ReadAhead, SampleOrder, SampleSource, StepLoader, StepSize
from megatron_rb.data.packing import Budget
from megatron_rb.data.padding import PaddingPolicy, Size, largest_micro_batch
from megatron_rb.parallel.mesh import Mesh
from megatron_rb.parallel.session import Session
from megatron_rb.platform.dtypes import DTYPES
from megatron_rb.tasks.sft import BatchRules, SupervisedFineTuning
from megatron_rb.tasks.value import ValueEstimation
from megatron_rb.train.allocator import release_cached_memory
from megatron_rb.train.step import Runner

TASKS: dict[str, type[SupervisedFineTuning]] = {"sft": SupervisedFineTuning, "value": ValueEstimation}


@dataclass(frozen=True)
class TaskData:
    """The samples of a run, and where those are named that cannot be used."""

    training: SampleSource
    evaluation: SampleSource | None
    """Held-out samples; None = no evaluation."""
    ledger: Ledger


def build_task(config: Config, derived: Derived, runner: Runner, samples: TaskData) -> SupervisedFineTuning:
    """The task of a config with its loader.

    Raises:
        ValueError: the config names no known task or padding.
    """
    if config.task.name not in TASKS:
        raise ValueError(f"task.name '{config.task.name}' is not known; use {' or '.join(TASKS)}")
    platform = runner.session.platform
    needs_pixels = any(chunk.module.part.needs_pixels for chunk in runner.chunks)
    return TASKS[config.task.name](
        runner,
        build_loader(config, derived, runner.mesh, samples, needs_pixels=needs_pixels),
        samples.evaluation,
        samples.ledger,
        BatchRules(
            Budget(config.data.seq_length, config.data.max_patches),
            needs_pixels=needs_pixels,
            sequence_parallel=derived.sequence_parallel,
            multiple=derived.micro_batch_multiple,
            padding=_padding(config, derived, runner.session, samples.training),
            pixel_dtype=DTYPES[config.model.dtype],
            pin_memory=platform.offers("pinned_memory"),
            outgrown=partial(release_cached_memory, platform),
        ),
    )


def build_loader(config: Config, derived: Derived, mesh: Mesh, samples: TaskData, *, needs_pixels: bool) -> StepLoader:
    """The steps of this rank from their beginning."""
    data, training = config.data, samples.training
    budget = Budget(data.seq_length, data.max_patches)
    fingerprint = training.fingerprint if isinstance(training, ConversationDataset) else None
    return StepLoader(
        training,
        StepSize(budget, data.global_batch_size, data.global_micro_batches, derived.micro_batch_multiple),
        RankShare(mesh.dp_rank, mesh.dp_size, needs_pixels, mesh.tp_rank, mesh.tp_size),
        SampleOrder(config.seed, data.shuffle, fingerprint, data.allow_changed),
        samples.ledger,
        ReadAhead(data.prefetch_steps, data.decode_threads),
    )


def _padding(config: Config, derived: Derived, session: Session, training: SampleSource) -> PaddingPolicy | None:
    data = config.data
    if data.padding not in ("auto", "buckets", "none"):
        raise ValueError(f"data.padding is '{data.padding}'; use auto, buckets or none")
    if data.padding == "none" or (data.padding == "auto" and session.platform.name == "cpu"):
        return None
    rows = derived.cp_size * (derived.tp_size if derived.sequence_parallel else 1)
    samples = len(training) if data.global_micro_batches else data.global_batch_size
    largest = largest_micro_batch(training.sizes, Size(data.seq_length, data.max_patches), samples)
    merge_unit = session.shape.vision.merge_unit
    return PaddingPolicy(largest, Size(derived.token_multiple, rows * merge_unit), data.padding_buckets)
