"""Answers of a checkpoint by this stack, in processes of its own on any layout; a stopped run goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rb.checkpoint.manifest import find_checkpoint, find_side_files
from megatron_rb.config.compose import CONFIG_FILE, config_from_file, save_config, with_settings
from megatron_rb.config.derive import check_tp_size
from megatron_rb.config.rules import either
from megatron_rb.config.schema import Config, ModelConfig, ParallelConfig, PlatformConfig
from megatron_rb.data.answer_file import check_same_source, rows_in, write_whole
from megatron_rb.generation.answering import without_limits, write_questions_left
from megatron_rb.generation.questions import Questions
from megatron_rb.generation.source import source_of_stack
from megatron_rb.generation.spec import (
    BatchLimits,
    GenerationSpec,
    Sampling,
    parts_of,
    scratch_folder,
)
from megatron_rb.layout import parse_layout
from megatron_rb.models.kernel_report import refused_settings
from megatron_rb.platform import get_platform
from megatron_rb.shapes.balance import default_layout
from megatron_rb.shapes.shape import RoboBrainShape, load_shape

OVERRIDABLE = ("kernels.", "model.layers", "platform.name", "platform.tf32")
"""Settings of the run that answers need not follow."""
TIMEOUT_MINUTES = 24 * 60.0
"""Copies of the model may end long after each other; what fails ends the others through the launcher."""
Start = Callable[[Path, int], int]
"""Starts so many generation workers on a folder, waits, and returns their exit code."""


@dataclass(frozen=True)
class StackRequest:
    """What a user asks for; what is left empty follows from the checkpoint."""

    checkpoint: str
    """A checkpoint, a folder with checkpoints, a run folder, or a Hugging Face folder."""
    hf: str = ""
    """Config and tokenizer; empty = those of the checkpoint."""
    tp_size: int = 1
    pp_size: int = 0
    """0 = one rank per slice of the layout."""
    processes: int = 0
    """0 = one copy of the model; more copies are data parallel."""
    layout: str = ""
    """Empty = balanced by parameters."""
    sequence_parallel: bool = False
    dtype: str = ""
    """`bf16` or `fp32`; empty = as trained, else bf16 on accelerators."""
    sequences: int = BatchLimits.sequences
    max_new_tokens: int = 256
    sampling: Sampling = Sampling()
    settings: tuple[str, ...] = ()
    """`key=value` in place of what the run was trained with, of `OVERRIDABLE`."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; an answer needs at least 1")


@dataclass(frozen=True)
class Weights:
    """Where a model comes from."""

    folder: Path
    hf: Path
    config: Config | None
    """Of the run that trained it, where that lies beside it: its prompt form and picture sizes are asked in."""


def answer_with_stack(questions: Questions, request: StackRequest, start: Start) -> dict[str, str]:
    """Answers by question id; while the run lasts every copy of the model has a part beside the file of answers.

    A question whose pictures cannot be read gets no answer and a line in the ledger.

    Raises:
        ValueError: the checkpoint, the layout or the answers that are there do not fit the request, or a process
            failed; what was answered so far is kept.
    """
    out = questions.out
    weights = find_weights(request)
    shape = load_shape(weights.hf)
    config = generation_config(request, weights, shape, questions.media_root)
    source = source_of_stack(weights.folder, weights.hf, config, request.sampling, request.max_new_tokens)
    check_same_source(out, source)
    done = collect_parts(out, questions.rows)
    asked = write_questions_left(questions, done)
    if asked is None:
        return done
    folder = scratch_folder(out)
    folder.mkdir(exist_ok=True)
    limits = BatchLimits(request.sequences)
    spec = GenerationSpec(str(weights.folder), str(asked), str(out), request.max_new_tokens, request.sampling, limits)
    spec.write(folder)
    save_config(config, folder / CONFIG_FILE)
    code = start(folder, config.world_size)
    done = collect_parts(out, questions.rows)
    if code:
        raise ValueError(
            f"a process of the generation ended with exit code {code}; its output stands above and in {folder}/logs. "
            f"{len(done)} of {len(questions.rows)} answers are kept in {out}, and the same command goes on from there"
        )
    return done


def find_weights(request: StackRequest) -> Weights:
    """The checkpoint that is meant, its config and tokenizer, and the settings it was trained with."""
    path = Path(request.checkpoint)
    if (path / "config.json").is_file():
        return Weights(path, Path(request.hf or path), None)
    checkpoint = find_checkpoint(path)
    settings = checkpoint.parent.parent / CONFIG_FILE
    config = config_from_file(settings) if settings.is_file() else None
    return Weights(checkpoint, find_side_files(checkpoint, request.hf), config)


def collect_parts(out: Path, questions: Sequence[Mapping]) -> dict[str, str]:
    """Put the parts of all copies of the model into `out`, in the order of the questions, and remove them."""
    done = rows_in(out)
    parts = parts_of(out)
    for part in parts:
        done |= rows_in(part)
    if parts:
        order = {str(row["id"]): number for number, row in enumerate(questions)}
        keys = sorted(done, key=lambda key: order.get(key, len(order)))
        write_whole(out, "".join(json.dumps(done[key]) + "\n" for key in keys))
    for part in parts:
        part.unlink()
    return {key: row["answer"] for key, row in done.items()}


def generation_config(request: StackRequest, weights: Weights, shape: RoboBrainShape, media_root: Path) -> Config:
    """The settings of the processes: kernels, layers and prompt form as trained, the layout as asked for.

    Raises:
        ValueError: degrees and processes do not fit, or a kernel that is asked for cannot run here.
    """
    strange = [text for text in request.settings if not text.startswith(OVERRIDABLE)]
    if strange:
        raise ValueError(
            f"--set {strange[0]}: only {either(OVERRIDABLE)} may be set here; the other options say how is answered"
        )
    trained = with_settings(weights.config or Config(), request.settings)
    parallel, processes = _parallelism(request, shape)
    config = Config(
        world_size=processes,
        model=ModelConfig(str(weights.hf), _dtype(request, weights), trained.model.layers),
        parallel=parallel,
        platform=_platform(request, trained),
        kernels=trained.kernels,
        data=without_limits(trained.data, media_root),
    )
    _check_kernels(config, shape, request.checkpoint)
    return config


def _platform(request: StackRequest, trained: Config) -> PlatformConfig:
    """Chosen anew: a model is often answered elsewhere than where it was trained."""
    asked = any(text.startswith("platform.name") for text in request.settings)
    return PlatformConfig(trained.platform.name if asked else "auto", tf32=trained.platform.tf32)


def _check_kernels(config: Config, shape: RoboBrainShape, checkpoint: str) -> None:
    refused = refused_settings(config, get_platform(config.platform.name), shape)
    if refused:
        way_out = " ".join(f"--set {setting}=auto" for setting in refused)
        raise ValueError(
            f"{checkpoint} cannot be answered as it was trained or as --set says: {'; '.join(refused.values())}; "
            f"add {way_out}"
        )


def _parallelism(request: StackRequest, shape: RoboBrainShape) -> tuple[ParallelConfig, int]:
    """How the model is spread, which need not be as it was trained, and over how many processes."""
    check_tp_size(request.tp_size, shape)
    pp_size = request.pp_size or request.layout.count("|") + 1
    if request.layout:
        layout = parse_layout(request.layout, shape.vision.num_layers, shape.text.num_layers, pp_size)
    else:
        layout = default_layout(shape, pp_size)
    cell = request.tp_size * pp_size
    processes = request.processes or cell
    if processes % cell:
        raise ValueError(
            f"{processes} processes cannot be split into tp {request.tp_size} x pp {pp_size}; use a multiple of {cell}"
        )
    parallel = ParallelConfig(
        request.tp_size,
        pp_size,
        layout=str(layout),
        sequence_parallel=request.sequence_parallel,
        timeout_minutes=TIMEOUT_MINUTES,
    )
    return parallel, processes


def _dtype(request: StackRequest, weights: Weights) -> str:
    if request.dtype:
        return request.dtype
    if weights.config is not None:
        return weights.config.model.dtype
    return "fp32" if get_platform("auto").name == "cpu" else "bf16"
