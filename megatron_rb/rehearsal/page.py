"""A page of a rehearsal: memory of the stages as bars beside the device's, and the lines behind every figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from megatron_rb.config.result_files import write_whole
from megatron_rb.rehearsal.moved import CheckpointSummary
from megatron_rb.rehearsal.records import KINDS
from megatron_rb.rehearsal.summary import RehearsalSummary, StageSummary

GIB = 2**30
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#9498a0")
"""Of the kinds of memory, in their order."""
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem; padding: 0 1rem; color: #1b1e23 }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; padding: .2rem .6rem .2rem 0;
vertical-align: top } td.n, th.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
tr { border-top: 1px solid #e3e5e9 } code { font-size: .85em; overflow-wrap: anywhere }
.bar { position: relative; display: flex; height: 1.6rem; background: #f1f2f4; margin: .2rem 0 }
.bar span { display: block; height: 100% } .limit { position: absolute; top: -.2rem; bottom: -.2rem; width: 2px;
background: #1b1e23 } .key span { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 1em }
.bad { color: #b3261e; font-weight: 600 } .good { color: #146c2e; font-weight: 600 }
@media (prefers-color-scheme: dark) { body { background: #16181c; color: #e4e6ea } .bar { background: #2a2d33 }
tr { border-color: #33363d } .limit { background: #e4e6ea } .bad { color: #ff8a80 } .good { color: #7bd88f } }
"""


def write_page(summary: RehearsalSummary, path: Path) -> None:
    """Write the page as one file that needs no other."""
    write_whole(path, "\n".join(_page(summary)))


def _page(summary: RehearsalSummary) -> Iterator[str]:
    title = escape(f"Rehearsal of {summary.name} on {summary.world_size} processes")
    yield f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
    yield f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body><h1>{title}</h1>'
    yield f"<p>{escape(_about(summary))}</p>"
    yield _verdict(summary)
    yield "<h2>Peak memory</h2>"
    yield from _bars(summary.stages)
    for stage in summary.stages:
        yield from _stage(stage)
    if summary.checkpoint is not None:
        yield from _checkpoint(summary.checkpoint)
    yield "<h2>What a rehearsal does not know</h2><ul>"
    yield from (f"<li>{escape(text)}</li>" for text in summary.approximations)
    yield "</ul></body></html>"


def _about(summary: RehearsalSummary) -> str:
    tokens, patches = summary.largest_batch
    degrees = " x ".join(f"{name} {size}" for name, size in summary.degrees.items())
    return (
        f"{degrees}; layout {summary.layout}; {summary.micro_batches} micro-batches of up to {tokens:,} tokens and "
        f"{patches:,} patches of {summary.samples}; {len(summary.ranks)} ranks rehearsed for a {summary.device}."
    )


def _verdict(summary: RehearsalSummary) -> str:
    if summary.sound:
        if summary.unseen_stages:
            return f"<p>Everything that was rehearsed fits; {escape(summary.verdict)}.</p>"
        return '<p class="good">Everything fits, and every message has its other side.</p>'
    over = [f"pipeline rank {stage.pp_rank} does not fit" for stage in summary.stages if stage.headroom < 0]
    texts = [*over, *(f"{defect.kind}: {defect.text}" for defect in summary.defects)]
    return "".join(f'<p class="bad">{escape(text)}</p>' for text in texts)


def _waits(title: str, waits: Sequence[tuple[str, str, int]]) -> Iterator[str]:
    if not waits:
        return
    yield f'<table><tr><th class="n">{title}</th><th>kind</th><th>line</th></tr>'
    for kind, line, count in waits:
        yield f'<tr><td class="n">{count}</td><td>{kind}</td><td><code>{escape(line)}</code></td></tr>'
    yield "</table>"


def _checkpoint(checkpoint: CheckpointSummary) -> Iterator[str]:
    yield '<h2>A checkpoint</h2><table><tr><th>GiB</th><th class="n">to the host</th><th class="n">written</th>'
    yield '<th class="n">read</th></tr>'
    rows = ("most of a rank", checkpoint.rank), ("most of a machine", checkpoint.node), ("all", checkpoint.world)
    for name, moved in rows:
        cells = "".join(f'<td class="n">{size / GIB:.3f}</td>' for size in (moved.copied, moved.written, moved.read))
        yield f"<tr><td>{name}</td>{cells}</tr>"
    yield "</table>"
    for phase, waits in checkpoint.waits.items():
        yield from _waits(f"waits a {phase}", waits)


def _bars(stages: Sequence[StageSummary]) -> Iterator[str]:
    """A bar per stage, on a scale that holds the largest peak and the device."""
    scale = 1.02 * max(max(stage.peak_bytes, stage.memory_bytes) for stage in stages)
    colours = dict(zip(KINDS, COLOURS, strict=True))
    keys = "".join(f'<span style="background:{colour}"></span>{kind}' for kind, colour in colours.items())
    yield f'<p class="key">{keys}; the line is what the device has</p>'
    for stage in stages:
        yield (
            f"<div>pp {stage.pp_rank}: {stage.peak_bytes / GIB:.2f} of {stage.memory_bytes / GIB:.1f} GiB, headroom "
            f"{stage.headroom:.1%}</div>"
        )
        parts = "".join(
            f'<span title="{kind} {size / GIB:.2f} GiB" style="width:{100 * size / scale:.3f}%;'
            f'background:{colours[kind]}"></span>'
            for kind, size in stage.kinds.items()
        )
        limit = 100 * stage.memory_bytes / scale
        yield f'<div class="bar">{parts}<i class="limit" style="left:{limit:.3f}%"></i></div>'


def _stage(stage: StageSummary) -> Iterator[str]:
    yield f"<h2>Pipeline rank {stage.pp_rank}: {escape(stage.blocks)}</h2>"
    yield (
        f"<p>{stage.operations:,} device operations and {stage.flops / 1e12:,.1f} TFLOP of products a step, "
        f"{stage.communicators} communicators, {stage.gloo_peers} peers over gloo.</p>"
    )
    yield '<table><tr><th class="n">GiB</th><th>kind</th><th>held by</th></tr>'
    for kind, line, size in stage.lines:
        yield f'<tr><td class="n">{size / GIB:.3f}</td><td>{kind}</td><td><code>{escape(line)}</code></td></tr>'
    yield "</table>"
    yield from _waits("waits a step", stage.waits)
    if stage.bytes_by_link:
        sent = ", ".join(f"{size / GIB:.3f} GiB {link}" for link, size in stage.bytes_by_link.items() if size)
        yield f"<p>Sends {escape(sent or 'nothing')} a step.</p>"
