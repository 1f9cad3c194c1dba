"""The demo recipe, shortened, in one world of processes: on cpu or on the simulated musa device."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def demo_runs(cases: list[dict[str, Any]], simulated: str = "") -> list[dict[str, Any]]:
    """Train every case as `rb train` does. A case has `settings` and may have `stop`: the step it is left after, and
    `dropout`: the share of every layer's outputs that is dropped.

    Args:
        simulated: name of the device to simulate; empty = none.

    Returns:
        per case the platform, and the losses and gradient norms of all its steps so far, as the run's file has them.
    """
    if simulated:
        from tests.platform.simulated_musa import install_named

        install_named(simulated, devices=1)
        os.environ["LOCAL_RANK"] = "0"  # every process sees a device of its own, as under MUSA_VISIBLE_DEVICES
    from megatron_rb.app.session import adapt_megatron

    adapt_megatron("auto")
    return [_demo_run(**case) for case in cases]


def _demo_run(settings: list[str], stop: int = 0, dropout: float = 0.0) -> dict[str, Any]:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from megatron_rb.app.assemble import assemble
    from megatron_rb.config.compose import load_config
    from megatron_rb.metrics.heartbeat import Heartbeat
    from megatron_rb.parallel.attempt import attempt_from_environment
    from megatron_rb.parallel.groups import destroy_groups
    from megatron_rb.train.loop import train
    from tests.distributed.in_turn import detach_chunks

    queued = len(torch.cuda._queued_calls)
    config = load_config(["experiment=demo", *settings])
    run = assemble(config, Heartbeat(None, None, 0), attempt_from_environment())
    run.train_steps = stop or run.train_steps
    if dropout:
        _drop_outputs(run.chunks, dropout)
    try:
        # The simulated device has no fused attention; the same sums on both sides leave only the device to differ.
        with sdpa_kernel(SDPBackend.MATH):
            train(run)
    finally:
        run.close()
    detach_chunks(run.chunks, param_sync=True)
    devices = {str(parameter.device) for chunk in run.chunks for parameter in chunk.parameters()}
    destroy_groups()
    lines = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines() if run.mesh.rank == 0 else []
    steps = [record for record in map(json.loads, lines) if record["kind"] == "step"]
    return {
        "devices": sorted(devices),
        "queued_cuda_calls": len(torch.cuda._queued_calls) - queued,
        "losses": [record["loss"] for record in steps],
        "norms": [record["grad_norm"] for record in steps],
    }


def _drop_outputs(chunks, share: float) -> None:
    """Under megatron-core's tracker, and again with the device's own generator; the models have no dropout."""
    import torch
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    def drop(layer, inputs, output: torch.Tensor) -> torch.Tensor:
        with get_cuda_rng_tracker().fork():
            output = torch.nn.functional.dropout(output, share)
        return torch.nn.functional.dropout(output, share)

    for chunk in chunks:
        for part in (chunk.module.vision, chunk.module.language):
            for layer in part.layers.values():
                layer.register_forward_hook(drop)
