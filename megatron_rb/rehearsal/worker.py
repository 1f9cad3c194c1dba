"""What a process of `rb rehearse` does: some ranks of a run, one after the other."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from megatron_rb.app.session import adapt_megatron
from megatron_rb.config.compose import CONFIG_FILE, config_from_file
from megatron_rb.config.schema import Config
from megatron_rb.platform import Platform
from megatron_rb.platform.rehearsal import REHEARSED
from megatron_rb.rehearsal.compilation import failures
from megatron_rb.rehearsal.device import Waits, stand_in_for_cuda
from megatron_rb.rehearsal.job import JOB_FILE, RUN_FOLDER, RehearsalJob
from megatron_rb.rehearsal.launches import Launch, Launches, stand_in_for_triton
from megatron_rb.rehearsal.memory import DeviceMemory
from megatron_rb.rehearsal.messages import Messages, stand_in_for_groups
from megatron_rb.rehearsal.musa_device import DEVICE_TYPE, stand_in_for_musa
from megatron_rb.rehearsal.packages.finder import stand_in_for_packages
from megatron_rb.rehearsal.samples import stand_in_for_pixels
from megatron_rb.rehearsal.stand_ins import StandIns

COMPILED_FOLDER = "compiled"
KERNELS_FILE = "kernels.pickle"
"""Lines on kernels that do not compile."""
REHEARSE = "megatron_rb.rehearsal.worker:rehearse"
"""What `app.worker` is told."""


def rehearse(folder: Path) -> None:
    """Rehearse what every `job.json` below the folder tells; the record of a rank is a file as soon as it is done."""
    os.environ.pop("LD_PRELOAD", None)  # it has done its work, and would be in the way of compilers
    for file in sorted(folder.glob(f"*/{JOB_FILE}")):
        rehearse_job(RehearsalJob.read(file.parent), file.parent)


def rehearse_job(job: RehearsalJob, folder: Path) -> None:
    """Rehearse some ranks of one run."""
    config = config_from_file(folder / RUN_FOLDER / CONFIG_FILE)
    with stood_in(job, config) as process, StandIns() as stand_ins:
        # These import megatron-core.
        from megatron_rb.rehearsal.oracle import Oracle
        from megatron_rb.rehearsal.parameter_groups import stand_in_for_parameter_groups
        from megatron_rb.rehearsal.rank import Instruments, rehearse_rank
        from megatron_rb.rehearsal.watch import Watch
        from megatron_rb.rehearsal.weights import stand_in_for_weights

        waits, messages, launches = process.waits, process.messages, process.launches
        stand_in_for_parameter_groups(stand_ins, config.model)
        started: set[Launch] = set()
        for rank in job.ranks:
            memory = DeviceMemory()
            watch = Watch(memory, waits, messages, Oracle(), process.is_pinned, job.device_type)
            with StandIns() as own:
                stand_in_for_weights(own, watch)
                own.set(FakeTensor, "tolist", lambda tensor, watch=watch: watch.read_all(tensor))
                tools = Instruments(memory, waits, messages, launches, watch)
                record = rehearse_rank(config, job, rank, tools)
            _write(record, folder / f"rank_{rank}.pickle")
            started |= {launch for phase in record.phases for launch in phase.launches}
        if job.compiled:
            major, minor = job.device.capability
            shared = folder / RUN_FOLDER / COMPILED_FOLDER
            shared.mkdir(exist_ok=True)
            _write(failures(started, 10 * major + minor, shared), folder / KERNELS_FILE)


@dataclass(frozen=True)
class StoodIn:
    """A process that takes itself for one with the device."""

    platform: Platform
    waits: Waits
    messages: Messages
    launches: Launches
    is_pinned: Callable[[torch.Tensor], bool]


@contextmanager
def stood_in(job: RehearsalJob, config: Config) -> Iterator[StoodIn]:
    """Stand in for the device of a run, its libraries and its other processes. What is imported here finds them."""
    with StandIns() as stand_ins:
        waits, messages, launches = Waits(), Messages(), Launches()
        is_pinned = _stand_in_for_device(stand_ins, job, waits)
        stand_in_for_packages(stand_ins, job.packages)
        platform = adapt_megatron(config.platform.name)
        stand_in_for_triton(stand_ins, launches, platform)
        stand_in_for_groups(stand_ins, messages)
        stand_in_for_pixels(stand_ins)
        yield StoodIn(platform, waits, messages, launches, is_pinned)


def _stand_in_for_device(stand_ins: StandIns, job: RehearsalJob, waits: Waits) -> Callable[[torch.Tensor], bool]:
    if job.device_type == DEVICE_TYPE:
        return stand_in_for_musa(stand_ins, job.device, waits)
    stand_ins.set(torch.cuda, REHEARSED, True)
    return stand_in_for_cuda(stand_ins, job.device, waits)


def _write(content: Any, path: Path) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".part")
    partial.write_bytes(pickle.dumps(content))
    partial.rename(path)
