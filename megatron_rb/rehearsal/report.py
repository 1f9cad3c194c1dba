"""The summary of a rehearsal in lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_rb.rehearsal.moved import CheckpointSummary
from megatron_rb.rehearsal.records import KINDS
from megatron_rb.rehearsal.summary import RehearsalSummary, StageSummary

GIB = 2**30
TEMPORARY_LINES = 5


def lines(summary: RehearsalSummary) -> Iterator[str]:
    """What `rb rehearse` prints."""
    degrees = " x ".join(f"{name} {size}" for name, size in summary.degrees.items() if size > 1 or name == "dp")
    tokens, patches = summary.largest_batch
    yield f"{summary.name}: {summary.world_size} processes = {degrees}, layout {summary.layout}"
    yield (
        f"rehearsed {len(summary.ranks)} ranks on a {summary.device}, {summary.micro_batches} micro-batches of up to "
        f"{tokens:,} tokens and {patches:,} patches of {summary.samples}; {summary.seconds:.0f} s of CPU time"
    )
    if summary.packages:
        yield f"with {', '.join(f'{name} {release}' for name, release in summary.packages.items())} stood in for"
    yield ""
    yield from _memory(summary)
    for stage in summary.stages:
        yield ""
        yield from _stage(stage)
    if summary.checkpoint is not None:
        yield ""
        yield from _checkpoint(summary.checkpoint)
    yield ""
    yield from _end(summary)


def _memory(summary: RehearsalSummary) -> Iterator[str]:
    yield f"{'GiB':<8}" + "".join(f"{kind:>13}" for kind in KINDS) + f"{'peak':>10}{'of':>8}{'headroom':>10}"
    for stage in summary.stages:
        kinds = "".join(f"{stage.kinds[kind] / GIB:>13.2f}" for kind in KINDS)
        total = f"{stage.peak_bytes / GIB:>10.2f}{stage.memory_bytes / GIB:>8.1f}{stage.headroom:>10.1%}"
        yield f"pp {stage.pp_rank:<5}{kinds}{total}" + ("" if stage.headroom >= 0 else "  DOES NOT FIT")


def _stage(stage: StageSummary) -> Iterator[str]:
    yield f"pp {stage.pp_rank} ({stage.blocks}): peak in {stage.peak_phase} of rank {stage.peak_rank}, held by"
    for kind, line, size in stage.lines[:TEMPORARY_LINES]:
        yield f"  {size / GIB:8.3f} GiB {kind}: {line}"
    sent = ", ".join(f"{size / GIB:.2f} GiB {link}" for link, size in stage.bytes_by_link.items() if size)
    yield (
        f"  {stage.operations:,} device operations, {stage.flops / 1e12:,.1f} TFLOP of products a step"
        f"{_missing(stage)}; sends {sent or 'nothing'}; "
        f"{stage.communicators} communicators, {stage.gloo_peers} peers over gloo"
    )
    count = sum(number for _, _, number in stage.waits)
    yield f"  the host waits {count} times a step for the device" + (":" if count else "")
    for kind, line, number in stage.waits:
        yield f"  {number:>6} x {kind}: {line}"


def _missing(stage: StageSummary) -> str:
    if not stage.uncounted:
        return ""
    return f" (without {stage.uncounted:,} calls of attention whose borders the host does not know)"


def _checkpoint(checkpoint: CheckpointSummary) -> Iterator[str]:
    yield f"{'checkpoint':<16}{'GiB to the host':>17}{'written':>10}{'read':>10}"
    for name, moved in (
        ("most of a rank", checkpoint.rank),
        ("of a machine", checkpoint.node),
        ("all", checkpoint.world),
    ):
        yield f"{name:<16}{moved.copied / GIB:>17.3f}{moved.written / GIB:>10.3f}{moved.read / GIB:>10.3f}"
    for phase, waits in checkpoint.waits.items():
        count = sum(number for _, _, number in waits)
        yield f"  the host waits {count} times a {phase} for the device" + (":" if count else "")
        for kind, line, number in waits:
            yield f"  {number:>6} x {kind}: {line}"


def _end(summary: RehearsalSummary) -> Iterator[str]:
    for defect in summary.defects:
        yield f"{defect.kind}: {defect.text}"
    if summary.launches:
        yield f"Triton kernels are started in {summary.launches} ways"
    if not summary.defects:
        yield summary.verdict
    yield "what a rehearsal does not know:"
    for text in summary.approximations:
        yield f"  {text}"
