"""One process of a benchmark: warm-up, timed steps, traced steps, and what all ranks found, put together on rank 0."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_rb.bench.step import OURS, REFERENCES, beside_transformers
from megatron_rb.bench.timing import median_ratio
from megatron_rb.bench.train.process import Bench, TimedStep
from megatron_rb.bench.train.result import Baseline, RankFigures, Result, StepFigures, save_result, versions
from megatron_rb.bench.train.spec import read_spec
from megatron_rb.checkpoint.hf.training import padded_batches
from megatron_rb.config.schema import Config
from megatron_rb.data.loader import SampleSource
from megatron_rb.metrics.balance import balance_of
from megatron_rb.metrics.timeline import StageTimeline, bubble_ratios
from megatron_rb.models.work import Work
from megatron_rb.parallel.mesh import Mesh
from megatron_rb.parallel.session import Session
from megatron_rb.shapes.shape import model_fingerprint
from megatron_rb.tasks.build import build_loader
from megatron_rb.train.adapters import flops_of
from megatron_rb.train.peak import peak_of


def measure(session: Session, config: Config, folder: Path) -> None:
    """Run the benchmark that the spec in a folder describes; rank 0 writes its result there."""
    result = _result(Bench(session, config, read_spec(folder)))
    if result is not None:
        save_result(result, folder)


def _result(bench: Bench) -> Result | None:
    """None on all ranks but the first."""
    mesh, spec, config, platform = bench.mesh, bench.spec, bench.config, bench.platform
    layout = bench.session.layout
    _say(mesh, f"{spec.warmup} steps to warm up, {spec.steps} timed, {spec.traced} traced; layout {layout}")
    for _ in range(spec.warmup):
        bench.step()
    platform.reset_peak_memory()
    timed = [bench.step() for _ in range(spec.steps)]
    memory = platform.memory()
    traced = [bench.traced_step() for _ in range(spec.traced)]
    bench.close()
    steps, loads = _gather_steps(bench, timed)
    ranks, timelines = _gather_ranks(bench, traced, memory.peak_allocated or memory.allocated)
    peak = peak_of(platform, config.model.dtype, spec.peak_tflops)
    baseline = _baseline(bench) if spec.baseline else None
    if mesh.rank:
        return None
    return Result(
        date=time.strftime("%Y-%m-%d"),
        versions=versions(),
        device=platform.info(),
        devices=mesh.world_size,
        model={"name": spec.model, "family": bench.shape.family, **model_fingerprint(bench.shape)},
        mix=asdict(spec.mix) if spec.mix is not None else _of_files(config, bench.samples.training),
        settings=_settings(bench),
        warmup=spec.warmup,
        steps=steps,
        ranks=ranks,
        timeline=timelines,
        loads=loads[0].tolist(),
        balance=balance_of(loads, config.data.seq_length),
        peak=peak,
        baseline=baseline,
    )


def _gather_steps(bench: Bench, timed: list[TimedStep]) -> tuple[tuple[StepFigures, ...], list[np.ndarray]]:
    """Figures of every step over all ranks, and its `[dp ranks, micro-batches, 2]` tokens and patches."""
    mesh = bench.mesh
    # One tensor-parallel rank of the first stage speaks for all: they have the same rows.
    speaks_for = mesh.dp_rank if mesh.tp_rank == mesh.pp_rank == 0 else -1
    own = [(speaks_for, step.seconds, step.wait_seconds, [astuple(work) for work in step.works]) for step in timed]
    everyone = _gather(own, mesh)
    steps, loads = [], []
    count_flops = flops_of(bench.config.model, bench.shape)
    for number in range(len(timed)):
        entries = [ranks[number] for ranks in everyone]
        batches = works_of_replicas(entries, mesh.dp_size)
        total = sum((work for rank in batches for work in rank), Work())
        flops = count_flops(total)
        steps.append(
            StepFigures(
                seconds=max(entry[1] for entry in entries),
                data_wait_seconds=max(entry[2] for entry in entries),
                samples=total.samples,
                tokens=total.tokens,
                labels=total.labels,
                patches=total.patches,
                flops=flops,
            )
        )
        loads.append(np.array([[(work.tokens, work.patches) for work in rank] for rank in batches]))
    return tuple(steps), loads


def works_of_replicas(entries: list[tuple[int, float, float, list[tuple]]], dp_size: int) -> list[list[Work]]:
    """Work of every replica's micro-batches, each put together from its context-parallel ranks."""
    replicas: list[list[Work]] = [[] for _ in range(dp_size)]
    for dp_rank, _, _, works in entries:
        if dp_rank < 0:
            continue
        parts = [Work(*values) for values in works]
        before = replicas[dp_rank]
        # The samples are the same on all of these ranks.
        replicas[dp_rank] = [a + replace(b, samples=0) for a, b in zip(before, parts, strict=True)] if before else parts
    return replicas


def _gather_ranks(
    bench: Bench, traced: list[tuple[dict[str, float], StageTimeline]], peak: int | None
) -> tuple[tuple[RankFigures, ...], tuple[StageTimeline, ...]]:
    mesh = bench.mesh
    medians = {name: statistics.median(sections[name] for sections, _ in traced) for name in traced[0][0]}
    blocks = " + ".join(
        str(bench.session.layout).split(" | ")[part.index] for part in bench.session.layout.slices_of_rank(mesh.pp_rank)
    )
    everyone = _gather((mesh.pp_rank, blocks, medians, peak, [timeline for _, timeline in traced]), mesh)
    ratios = [bubble_ratios([entry[4][number] for entry in everyone]) for number in range(len(traced))]
    ranks = tuple(
        RankFigures(rank, pp_rank, text, sections, statistics.median(found[rank] for found in ratios), memory)
        for rank, (pp_rank, text, sections, memory, _) in enumerate(everyone)
    )
    return ranks, tuple(entry[4][-1] for entry in everyone)


def _gather(value: Any, mesh: Mesh) -> list[Any]:
    everyone: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(everyone, value)
    return everyone


def _baseline(bench: Bench) -> Baseline:
    """The first step of the mix on both sides, in this process."""
    config, spec = bench.config, bench.spec
    loader = build_loader(config, bench.derived, bench.mesh, bench.samples, needs_pixels=True)
    packs = loader.next_step().micro_batches
    loader.close()
    samples = [sample for pack in packs for sample in pack]
    padded = padded_batches(samples, config.data.seq_length)
    bench.chunks.clear()
    _say(bench.mesh, f"transformers: {len(samples)} samples, in {len(padded)} padded batches and one by one")
    del bench.optimizer, bench.task, bench.runner, bench.tracer, bench.timers
    bench.platform.empty_cache()
    of_folder = replace(config, checkpoint=replace(config.checkpoint, init=config.model.hf_path))
    found = beside_transformers(bench.session, of_folder, {OURS[0]: packs}, padded, min(spec.steps, 10))
    side = found.faster(REFERENCES)
    ours, theirs = found.times[OURS[0]], found.times[side]
    return Baseline(
        side=side,
        seconds=theirs.median,
        our_seconds=ours.median,
        speedup=median_ratio(theirs.wall, ours.wall),
        losses=found.losses,
        tokens=found.tokens,
        patches=found.patches,
    )


def _settings(bench: Bench) -> dict[str, Any]:
    config, mesh = bench.config, bench.mesh
    return {
        "dtype": config.model.dtype,
        "tp_size": mesh.tp_size,
        "pp_size": mesh.pp_size,
        "cp_size": mesh.cp_size,
        "dp_size": mesh.dp_size,
        "layout": str(bench.session.layout),
        "threads": torch.get_num_threads(),
        "recompute": asdict(config.model.recompute),
        "freeze": asdict(config.model.freeze),
        "layers": config.model.layers,
        "kernels": asdict(config.kernels),
        "padding": config.data.padding,
        "sequence_parallel": bench.derived.sequence_parallel,
        "distributed_optimizer": config.parallel.distributed_optimizer,
        "seed": config.seed,
    }


def _of_files(config: Config, samples: SampleSource) -> dict[str, Any]:
    """Real data in place of a mix: which files, and their mean sample."""
    tokens, patches = samples.sizes.mean(axis=0).tolist()
    return {
        "name": "files",
        "files": [Path(name).name for name in config.data.train],
        "samples": len(samples),
        "mean_tokens": tokens,
        "mean_patches": patches,
        "seq_length": config.data.seq_length,
        "max_patches": config.data.max_patches,
        "global_batch_size": config.data.global_batch_size,
        "global_micro_batches": config.data.global_micro_batches,
    }


def _say(mesh: Mesh, text: str) -> None:
    if mesh.rank == 0:
        print(text, flush=True)
