"""One process of `rb bench plan`: times blocks and link, plans, then takes steps under every layout in turn."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_rb.app.session import session_of
from megatron_rb.bench.blocks import ALONE, calibration_of, draw_micro_batch, sizes_of, time_blocks
from megatron_rb.bench.plan.two_processes import (
    DTYPE,
    EQUAL,
    KEPT_SPLITS,
    PP_SIZE,
    Case,
    cases_of,
    device_of,
    layouts_of,
    planning_task,
)
from megatron_rb.config.compose import CONFIG_FILE, config_from_file
from megatron_rb.config.schema import Config, ModelConfig
from megatron_rb.parallel.session import Session
from megatron_rb.parallel.world import world_from_environment
from megatron_rb.planner.calibration import load_calibration
from megatron_rb.planner.cost import Pricing
from megatron_rb.planner.device import load_device
from megatron_rb.planner.task import PlanTask
from megatron_rb.planner.workload import MicroBatches
from megatron_rb.train.build import build_trainable
from megatron_rb.train.step import Runner, train_pass

BLOCK_ROUNDS = 7


def measure_cases(folder: Path) -> None:
    """Write `blocks<N>.json` (calibration) and `case<N>.json` (times of every layout) into a folder."""
    spec = json.loads((folder / "spec.json").read_text())
    side_by_side = config_from_file(folder / CONFIG_FILE)
    in_a_pipeline = replace(side_by_side, parallel=replace(side_by_side.parallel, pp_size=PP_SIZE))
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[world_from_environment()[0] % len(cores)]})
    for number, case in enumerate(cases_of(spec["cases"])):
        batches, calibration = _micro_batches(case), folder / f"blocks{number}.json"
        content: dict[str, Any] = {"batches": [list(values[0]) for values in vars(batches).values()]}
        with session_of(side_by_side, case.shape) as session:
            link = content["link"] = measure_link()
            calibrate(session, case, calibration)
        task = planning_task(case, batches, device_of(link), load_calibration(calibration))
        with session_of(in_a_pipeline, case.shape) as session:
            content["times"] = measure(session, case, task, spec["rounds"])
        if dist.get_rank() == 0:
            (folder / f"case{number}.json").write_text(json.dumps(content))


def _micro_batches(case: Case) -> MicroBatches:
    drawn = [draw_micro_batch(case.shape, tokens, patches, n) for n, (tokens, patches) in enumerate(case.sizes)]
    seen = [sizes_of(batch) for batch in drawn]
    names = list(vars(seen[0]))
    return MicroBatches(*(np.array([[float(getattr(one, name)[0]) for one in seen]]) for name in names))


def measure_link(rounds: int = 200) -> dict[str, float]:
    """Bandwidth and latency between the two processes, from the time of small and large messages there and back."""
    small, large = (_ping(size, rounds) for size in (4, 1 << 20))
    return {"latency": small, "bandwidth": (4 << 20) / max(large - small, 1e-9)}


def _ping(values: int, rounds: int) -> float:
    tensor, peer, taken = torch.zeros(values), 1 - dist.get_rank(), []
    for _ in range(rounds):
        start = time.perf_counter()
        if dist.get_rank() == 0:
            dist.send(tensor, peer)
            dist.recv(tensor, peer)
        else:
            dist.recv(tensor, peer)
            dist.send(tensor, peer)
        taken.append((time.perf_counter() - start) / 2)
    return float(np.median(taken))


def calibrate(session: Session, case: Case, path: Path) -> None:
    """Time the blocks on both cores at once, since both work in a pipeline; the mean of the two is kept."""
    pricing = Pricing(load_device("cpu"), DTYPE)
    times = time_blocks(session, pricing, sorted(set(case.sizes)), BLOCK_ROUNDS, lambda _: dist.barrier())
    measured = torch.tensor([item.measured for item in times], dtype=torch.float64)
    dist.all_reduce(measured)
    times = [replace(item, measured=value / 2) for item, value in zip(times, measured.tolist(), strict=True)]
    if session.mesh.rank == 0:
        info = ", ".join(f"{name} {value}" for name, value in session.platform.info().items())
        calibration_of(times, pricing.device, DTYPE, f"{info}, two processes").save(path)
    dist.barrier()


def measure(session: Session, case: Case, task: PlanTask, rounds: int) -> Mapping[str, list[float]]:
    """Seconds of a step under every layout, by round: the slower of the two processes."""
    steps = {role: _step(session.with_model(case.shape, cut), case) for role, cut in layouts_of(case, task).items()}
    first = {role: _timed(step) for role, step in steps.items()}  # also the warm-up
    splits = sorted((role for role in steps if role.startswith("ViT and")), key=lambda role: first[role])
    kept = ["planned", EQUAL, *splits[:KEPT_SPLITS]]
    times: dict[str, list[float]] = {role: [] for role in kept}
    for number in range(rounds):
        for role in kept:
            times[role].append(_timed(steps[role]))
        if session.mesh.rank == 0:
            print(f"{case.name}: round {number + 1} of {rounds}", flush=True)
    return times


def _timed(step: Callable[[], None]) -> float:
    """Seconds of the slower process; the same number on both."""
    dist.barrier()
    start = time.perf_counter()
    step()
    taken = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return float(taken)


def _step(session: Session, case: Case) -> Callable[[], None]:
    trainable = build_trainable(session, Config(model=ModelConfig(dtype=DTYPE), parallel=ALONE), init="random")
    runner = Runner(trainable.chunks, session)
    batches = [draw_micro_batch(case.shape, tokens, patches, n) for n, (tokens, patches) in enumerate(case.sizes)]

    def step() -> None:
        for chunk in trainable.chunks:
            chunk.zero_grad_buffer()
        trainable.optimizer.zero_grad()
        train_pass(runner, batches)
        trainable.optimizer.step()

    return step
