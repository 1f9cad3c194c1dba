"""A rehearsal of a run whose name is that of a fault: the code of the product is changed accordingly."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from megatron_rb.rehearsal.job import JOB_FILE, RehearsalJob
from megatron_rb.rehearsal.stand_ins import StandIns
from megatron_rb.rehearsal.worker import rehearse_job

KEPT: list[torch.Tensor] = []


def rehearse(folder: Path) -> None:
    os.environ.pop("LD_PRELOAD", None)
    for file in sorted(folder.glob(f"*/{JOB_FILE}")):
        job = RehearsalJob.read(file.parent)
        with StandIns() as changes:
            FAULTS[job.name](changes)
            rehearse_job(job, file.parent)
        KEPT.clear()


def on_rank(number: int) -> bool:
    return os.environ["RANK"] == str(number)


def wait_in_a_block(changes: StandIns) -> None:
    from megatron_rb.models.language.blocks import DecoderLayer

    forward = DecoderLayer.forward

    def waiting(self, x, *inputs):
        out = forward(self, x, *inputs)
        out.sum().item()
        return out

    changes.set(DecoderLayer, "forward", waiting)


def tensor_kept_alive(changes: StandIns) -> None:
    from megatron_rb.models.language.blocks import DecoderLayer

    forward = DecoderLayer.forward

    def keeping(self, x, *inputs):
        KEPT.append(torch.empty(2**20, device=x.device))
        return forward(self, x, *inputs)

    changes.set(DecoderLayer, "forward", keeping)


def skipped_collective(changes: StandIns) -> None:
    from megatron.core.tensor_parallel import mappings

    reduce = mappings._reduce
    changes.set(mappings, "_reduce", lambda input_, group: input_ if on_rank(1) else reduce(input_, group))


def wrong_size(changes: StandIns) -> None:
    from megatron.core.tensor_parallel import mappings

    reduce = mappings._reduce

    def larger(input_, group):
        if on_rank(1):
            torch.distributed.all_reduce(
                torch.empty(input_.numel() + 2, dtype=input_.dtype, device="cuda"), group=group
            )
            return input_
        return reduce(input_, group)

    changes.set(mappings, "_reduce", larger)


def wrong_dtype(changes: StandIns) -> None:
    from megatron_rb.models import build

    core_config = build.core_config

    def other(*arguments):
        config = core_config(*arguments)
        config.pipeline_dtype = torch.float32 if on_rank(1) else config.pipeline_dtype
        return config

    changes.set(build, "core_config", other)


def lost_message(changes: StandIns) -> None:
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    send = P2PCommunicator.send_backward
    changes.set(P2PCommunicator, "send_backward", lambda self, *tensors: None if on_rank(1) else send(self, *tensors))


def swapped_order(changes: StandIns) -> None:
    from megatron_rb.train import totals

    reduce, held = torch.distributed.all_reduce, []

    def later(tensor, *arguments, **keywords):
        if on_rank(1) and tensor.dtype == torch.int64:
            held.append(tensor)
            return None
        result = reduce(tensor, *arguments, **keywords)
        if held:
            reduce(held.pop())
        return result

    changes.set(totals.dist, "all_reduce", later)


def kernel_that_does_not_compile(changes: StandIns) -> None:
    from megatron_rb.kernels.dynamic_padding import triton_impl

    changes.set(triton_impl, "WARPS", 3)


FAULTS = {
    fault.__name__: fault
    for fault in (
        wait_in_a_block,
        tensor_kept_alive,
        skipped_collective,
        wrong_size,
        wrong_dtype,
        lost_message,
        swapped_order,
        kernel_that_does_not_compile,
    )
}
