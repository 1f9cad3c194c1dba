"""Runs both sides of a parity check and prints where they part."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_rb.checkpoint.hf.oracle import Trace, run_transformers
from megatron_rb.config.failures import ProcessFailed
from megatron_rb.config.schema import Config, DataConfig
from megatron_rb.data.build import build_dataset, build_encoder
from megatron_rb.data.ledger import Ledger, read_ledger
from megatron_rb.data.problems import NoUsableSample
from megatron_rb.data.sample import EncodedSample
from megatron_rb.layout import PipelineLayout, parse_layout
from megatron_rb.parity.differences import (
    GRADIENT_TOLERANCE,
    LOGITS_TOLERANCE,
    Difference,
    compare,
    first_parting,
    load_rank_traces,
    merge_traces,
)
from megatron_rb.parity.spec import ParitySpec
from megatron_rb.shapes.shape import RoboBrainShape, load_shape

MAX_SAMPLE_TOKENS = 1 << 20
"""Samples of a parity run are never refused for their length."""


def run_parity(
    folder: Path,
    config: Config,
    spec: ParitySpec,
    samples: Sequence[EncodedSample],
    start: Callable[[Path, int], int],
) -> tuple[Trace, list[Difference]]:
    """Start the processes of the stack, run transformers on the config's model in this one, compare.

    Args:
        start: starts that many parity workers on the folder, waits, and returns their exit code.

    Raises:
        ProcessFailed: a process of the stack failed; its message has been printed.
    """
    ours = run_workers(folder, config, spec, samples, start)
    hf_path = config.model.hf_path
    reference = run_transformers(hf_path, load_shape(hf_path), list(samples), spec.grads)
    return ours, compare(ours, reference)


def run_workers(
    folder: Path,
    config: Config,
    spec: ParitySpec,
    samples: Sequence[EncodedSample],
    start: Callable[[Path, int], int],
) -> Trace:
    """What the stack does with samples, in as many processes as the config says."""
    spec.write(folder, samples, config)
    code = start(folder, config.world_size)
    if code:
        raise ProcessFailed("a process of the parity run", code)
    return merge_traces(load_rank_traces(folder, config.world_size))


def read_layout(text: str, shape: RoboBrainShape, pp_size: int) -> PipelineLayout:
    """The layout of a parity run; no text = everything in one stage."""
    vision, decoder = shape.vision.num_layers, shape.text.num_layers
    text = text or f"P v*{vision} M E t*{decoder} L"
    return parse_layout(text, vision, decoder, pp_size or text.count("|") + 1)


def read_samples(path: str, hf_path: str, shape: RoboBrainShape, folder: Path) -> list[EncodedSample]:
    """All conversations of a jsonl file, images included.

    Raises:
        ValueError: a conversation or an image cannot be used; a comparison leaves nothing out.
    """
    limits = DataConfig(seq_length=MAX_SAMPLE_TOKENS, max_patches=MAX_SAMPLE_TOKENS, verify="decode")
    encoder, ledger, samples = build_encoder(limits, hf_path, shape), Ledger(folder / "ledger.jsonl"), []
    with contextlib.suppress(NoUsableSample):  # that sends the reader to the ledger, which goes with the folder
        dataset = build_dataset(limits, encoder, [path], ledger)
        samples = [dataset[number] for number in range(len(dataset))]
    refused = read_ledger(ledger.path)
    if refused:
        first = refused[0]
        raise ValueError(f"{len(refused)} rows of {path} cannot be used; line {first['line']}: {first['reason']}")
    if not samples:
        raise ValueError(f"{path} holds no row; give conversations, one per line, or leave --samples out")
    return samples


def print_report(rows: Sequence[Difference]) -> None:
    """Blocks in order, then logits and loss, then the gradients that matter; a verdict at the end."""
    console = Console()
    table = Table("compared", "max difference", "relative", "verdict")
    gradients = [row for row in rows if row.name.startswith("gradient ")]
    shown = [row for row in rows if row not in gradients]
    shown += sorted(gradients, key=lambda row: -row.relative)[:5]
    for row in shown:
        verdict = {True: "[green]ok", False: "[red]too far", None: ""}[row.passed]
        table.add_row(row.name, f"{row.max_abs:.2e}", f"{row.relative:.2e}", verdict)
    console.print(table)
    if gradients:
        within = sum(row.passed is True for row in gradients)
        console.print(f"{within} of {len(gradients)} gradients within {GRADIENT_TOLERANCE:g} relative; the worst above")
    parting = first_parting(rows)
    if parting is not None:
        console.print(f"first block that parts: {parting.name} (relative {parting.relative:.2e})")
    failed = [row.name for row in rows if row.passed is False]
    console.print(
        f"[red]different: {', '.join(failed[:5])}"
        if failed
        else f"[green]equal within {LOGITS_TOLERANCE:g} (logits, absolute)"
    )
