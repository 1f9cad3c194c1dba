"""Case for test_many_ranks: the files of every rank after each part of a run."""

from __future__ import annotations

import os

from tests.distributed.in_turn import adapted_cpu


def files_after_parts(settings: list[str]) -> dict[str, int]:
    """Files that this rank has open beyond those before it joined the world, by what it has done until then."""
    os.environ["TORCH_GLOO_LAZY_INIT"] = "1"  # as on a device
    adapted_cpu()
    from megatron_rb.app.assemble import assemble
    from megatron_rb.config.compose import load_config
    from megatron_rb.metrics.heartbeat import Heartbeat
    from megatron_rb.parallel.attempt import Attempt
    from megatron_rb.train.loop import take_step

    before = _count()
    run = assemble(load_config(settings), Heartbeat(None, None, 0), Attempt("", None, None, None))
    found = {"start": _count() - before}
    take_step(run)
    found["step"] = _count() - before
    run.save()
    found["save"] = _count() - before
    run.evaluate()
    found["evaluation"] = _count() - before
    run.close()
    return found


def _count() -> int:
    return len(os.listdir("/proc/self/fd"))
