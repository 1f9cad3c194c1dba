"""One process of `rb bench plan`: times blocks and link, plans, then takes steps under every layout in turn."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_rb.planner.workload import MicroBatches
from megatron_rb.platform import get_platform
from megatron_rb.platform.mcore_shims import install_mcore_shims

MINUTES = 15.0
BLOCK_ROUNDS = 7


def main(argv: Sequence[str]) -> int:
    """Write `blocks<N>.json` (calibration) and `case<N>.json` (times of every layout) into a folder."""
    folder = Path(argv[0])
    spec = json.loads((folder / "spec.json").read_text())
    platform = get_platform("cpu")
    install_mcore_shims(platform)

    from megatron_rb.bench.plan.two_processes import cases_of
    from megatron_rb.parallel.groups import start_process_group, world_from_environment

    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[world_from_environment()[0] % len(cores)]})
    torch.set_num_threads(1)
    start_process_group(platform, MINUTES)
    link = measure_link()
    for number, case in enumerate(cases_of(spec["cases"])):
        batches = _micro_batches(case)
        calibrate(case, folder / f"blocks{number}.json", platform)
        content: dict[str, Any] = {"link": link, "batches": [list(values[0]) for values in vars(batches).values()]}
        content["times"] = measure(case, batches, link, folder / f"blocks{number}.json", platform, spec["rounds"])
        if dist.get_rank() == 0:
            (folder / f"case{number}.json").write_text(json.dumps(content))
    dist.barrier()
    dist.destroy_process_group()
    return 0


def _micro_batches(case) -> MicroBatches:
    from megatron_rb.bench.blocks import draw_micro_batch, sizes_of

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


def calibrate(case, path: Path, platform) -> None:
    """Time the blocks on both cores at once, since both work in a pipeline; the mean of the two is kept."""
    from megatron_rb.bench.blocks import calibration_of, time_blocks
    from megatron_rb.bench.plan.two_processes import DTYPE
    from megatron_rb.parallel.groups import build_groups, destroy_groups
    from megatron_rb.planner.cost import Pricing
    from megatron_rb.planner.device import load_device

    place = build_groups(1, 1, 1, MINUTES, seed=0)
    pricing = Pricing(load_device("cpu"), DTYPE)
    sizes = sorted(set(case.sizes))
    times = time_blocks(case.shape, pricing, place, platform, sizes, BLOCK_ROUNDS, lambda _: dist.barrier())
    measured = torch.tensor([item.measured for item in times], dtype=torch.float64)
    dist.all_reduce(measured)
    times = [replace(item, measured=value / 2) for item, value in zip(times, measured.tolist(), strict=True)]
    if dist.get_rank() == 0:
        info = ", ".join(f"{name} {value}" for name, value in platform.info().items())
        calibration_of(times, pricing.device, DTYPE, f"{info}, two processes").save(path)
    dist.barrier()
    destroy_groups()


def measure(
    case, batches: MicroBatches, link: dict[str, float], calibration: Path, platform, rounds: int
) -> dict[str, list[float]]:
    """Seconds of a step under every layout, by round: the slower of the two processes."""
    from megatron_rb.bench.plan.two_processes import (
        EQUAL,
        KEPT_SPLITS,
        PP_SIZE,
        device_of,
        layouts_of,
        planning_task,
    )
    from megatron_rb.parallel.groups import build_groups, destroy_groups
    from megatron_rb.planner.calibration import load_calibration

    task = planning_task(case, batches, device_of(link), load_calibration(calibration))
    layouts = layouts_of(case, task)
    place = build_groups(1, PP_SIZE, 1, MINUTES, seed=0)
    steps = {role: _step(case, layout, place, platform) for role, layout in layouts.items()}
    first = {role: _timed(step) for role, step in steps.items()}  # also the warm-up
    splits = sorted((role for role in steps if role.startswith("ViT and")), key=lambda role: first[role])
    kept = ["planned", EQUAL, *splits[:KEPT_SPLITS]]
    times: dict[str, list[float]] = {role: [] for role in kept}
    for number in range(rounds):
        for role in kept:
            times[role].append(_timed(steps[role]))
        if dist.get_rank() == 0:
            print(f"{case.name}: round {number + 1} of {rounds}", flush=True)
    destroy_groups()
    return times


def _timed(step: Callable[[], None]) -> float:
    """Seconds of the slower process; the same number on both."""
    dist.barrier()
    start = time.perf_counter()
    step()
    taken = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return float(taken)


def _step(case, layout, place, platform):
    from megatron_rb.bench.blocks import ALONE, draw_micro_batch
    from megatron_rb.bench.plan.two_processes import DTYPE
    from megatron_rb.config.schema import Config, ModelConfig
    from megatron_rb.train.build import build_trainable
    from megatron_rb.train.step import Runner, train_pass

    shape = case.shape
    config = Config(model=ModelConfig(dtype=DTYPE), parallel=ALONE)
    trainable = build_trainable(config, shape, layout, place, platform, init="random")
    runner = Runner(trainable.chunks, shape, place, platform.current_device())
    batches = [draw_micro_batch(shape, tokens, patches, n) for n, (tokens, patches) in enumerate(case.sizes)]

    def step() -> None:
        for chunk in trainable.chunks:
            chunk.zero_grad_buffer()
        trainable.optimizer.zero_grad()
        train_pass(runner, batches)
        trainable.optimizer.step()

    return step


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
