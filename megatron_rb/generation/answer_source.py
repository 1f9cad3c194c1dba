"""Where answers come from, as the command line says it: recorded ones, transformers, or this stack."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from megatron_rb.data.answer_file import read_answers
from megatron_rb.generation.questions import Questions
from megatron_rb.generation.spec import BatchLimits, Sampling

ANSWER = "megatron_rb.generation.run:answer"
StartWorkers = Callable[[str, Path, int], int]


def add_arguments(parser: argparse.ArgumentParser, max_new_tokens: int, answers_help: str) -> None:
    """`--answers`, `--hf` or `--ckpt`, and how the last two generate."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--answers", metavar="FILE", help=answers_help)
    source.add_argument("--ckpt", metavar="DIR", help="checkpoint, run or Hugging Face folder, answered by this stack")
    source.add_argument("--hf", metavar="DIR", help="Hugging Face folder, answered by transformers (greedy)")
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens)
    _add_stack_arguments(parser.add_argument_group("with --ckpt"))


def _add_stack_arguments(stack: argparse._ActionsContainer) -> None:
    stack.add_argument(
        "--tokenizer", default="", metavar="DIR", help="folder with config and tokenizer; default its own"
    )
    stack.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel degree")
    stack.add_argument("--pp", type=int, default=0, metavar="N", help="pipeline ranks; default one per slice")
    stack.add_argument("--layout", default="", metavar="TEXT", help="e.g. 'P v*3 | v*1 M E t*4 L'; default balanced")
    stack.add_argument("--processes", type=int, default=0, metavar="N", help="a multiple of tp x pp is data parallel")
    stack.add_argument("--sequence-parallel", action="store_true")
    stack.add_argument("--dtype", default="", choices=("", "bf16", "fp32"), help="default as trained")
    stack.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="key=value",
        help="in place of the run's own kernels.*, model.layers or platform; e.g. kernels.mrope=auto; may be repeated",
    )
    stack.add_argument("--batch", type=int, default=BatchLimits.sequences, help="answers side by side per copy")
    stack.add_argument("--temperature", type=float, default=0.0, help="0 = greedy; the GRM's own scripts use 0.1")
    stack.add_argument("--top-p", type=float, default=1.0)
    stack.add_argument("--top-k", type=int, default=0, help="0 = all")
    stack.add_argument("--sampling-seed", type=int, default=0, help="draws depend on it and the question id alone")


def shown_size(options: argparse.Namespace) -> Callable[[int, int], tuple[int, int]] | None:
    """(width, height) of a picture -> that of what the model's processor makes of it; None for recorded answers."""
    if options.answers:
        return None
    from megatron_rb.config.schema import DataConfig
    from megatron_rb.data.build import build_encoder
    from megatron_rb.generation.stack_answers import StackRequest, find_weights
    from megatron_rb.shapes.shape import load_shape

    settings, folder = DataConfig(), Path(options.hf or "")
    if options.ckpt:
        weights = find_weights(StackRequest(options.ckpt, options.tokenizer))
        folder, settings = weights.hf, weights.config.data if weights.config is not None else settings
    processor = build_encoder(settings, str(folder), load_shape(str(folder))).processor

    def shown(width: int, height: int) -> tuple[int, int]:
        grid = processor.image_grid(height, width)
        return grid.w * processor.patch_size, grid.h * processor.patch_size

    return shown


def answers_of(options: argparse.Namespace, questions: Questions, start_workers: StartWorkers) -> dict[str, str]:
    """Answers by question id, from where the options say.

    Args:
        start_workers: starts so many processes of a `module:function` on a folder and returns their exit code.

    Raises:
        ValueError: not one of the questions could be asked.
    """
    _check_read(options)
    if options.answers:
        return read_answers(Path(options.answers))
    answers = _generated(options, questions, start_workers)
    if questions.rows and not answers:
        raise ValueError(
            f"not one of the {len(questions.rows)} questions could be asked, so there is nothing to score; "
            f"{questions.ledger} says of each why"
        )
    return answers


def _check_read(options: argparse.Namespace) -> None:
    """Raise ValueError for an option that only --ckpt reads and that came without it."""
    if options.ckpt:
        return
    parser, source = argparse.ArgumentParser(), "--answers" if options.answers else "--hf"
    _add_stack_arguments(parser)
    unread = [
        f"--{name.replace('_', '-')}"
        for name, default in vars(parser.parse_args([])).items()
        if getattr(options, name, default) != default
    ]
    if unread:
        way_out = "leave it out" if options.answers else "--ckpt takes the same folder"
        raise ValueError(f"{', '.join(unread)} needs --ckpt and is not read with {source}; {way_out}")


def _generated(options: argparse.Namespace, questions: Questions, start_workers: StartWorkers) -> dict[str, str]:
    sampling = Sampling(options.temperature, options.top_p, options.top_k, options.sampling_seed)
    if options.hf:
        # Imported here, since recorded answers need neither torch nor transformers.
        from megatron_rb.generation.answering import answer_with_transformers

        return answer_with_transformers(questions, options.hf, options.max_new_tokens)
    from megatron_rb.generation.stack_answers import StackRequest, answer_with_stack

    request = StackRequest(
        options.ckpt,
        options.tokenizer,
        options.tp,
        options.pp,
        options.processes,
        options.layout,
        options.sequence_parallel,
        options.dtype,
        options.batch,
        options.max_new_tokens,
        sampling,
        tuple(options.set),
    )
    return answer_with_stack(questions, request, lambda folder, count: start_workers(ANSWER, folder, count))
