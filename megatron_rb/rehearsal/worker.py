"""What a process of `rb rehearse` does: some ranks of a run, one after the other."""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from megatron_rb.app.session import adapt_megatron
from megatron_rb.config.compose import CONFIG_FILE, config_from_file
from megatron_rb.data.mixes import Mix, mix_from_tree
from megatron_rb.platform.rehearsal import REHEARSED
from megatron_rb.rehearsal.device import DataSheet, Waits, stand_in_for_cuda
from megatron_rb.rehearsal.launches import Launches, stand_in_for_triton
from megatron_rb.rehearsal.memory import DeviceMemory
from megatron_rb.rehearsal.messages import Messages, stand_in_for_groups
from megatron_rb.rehearsal.samples import stand_in_for_pixels
from megatron_rb.rehearsal.stand_ins import StandIns

JOB_FILE, RUN_FOLDER = "job.json", "run"
REHEARSE = "megatron_rb.rehearsal.worker:rehearse"
"""What `app.worker` is told."""


@dataclass(frozen=True)
class Job:
    """What a worker is to rehearse; the settings of the run lie in its `run` folder."""

    ranks: list[int]
    world_size: int
    steps: int
    mix: Mix
    device: DataSheet

    def write(self, folder: Path) -> None:
        (folder / JOB_FILE).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Job:
        tree: dict[str, Any] = json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))
        mix, device = tree.pop("mix"), tree.pop("device")
        device["capability"] = tuple(device["capability"])
        return cls(**tree, mix=mix_from_tree(mix, JOB_FILE), device=DataSheet(**device))


def rehearse(folder: Path) -> None:
    """Rehearse the ranks of `job.json`; the record of each is a file `rank_N.pickle` as soon as it is done."""
    job, config = Job.read(folder), config_from_file(folder / RUN_FOLDER / CONFIG_FILE)
    with StandIns() as stand_ins:
        waits, messages, launches = Waits(), Messages(), Launches()
        is_pinned = stand_in_for_cuda(stand_ins, job.device, waits)
        stand_ins.set(torch.cuda, REHEARSED, True)
        platform = adapt_megatron(config.platform.name)
        stand_in_for_triton(stand_ins, launches, platform)
        stand_in_for_groups(stand_ins, messages)
        stand_in_for_pixels(stand_ins)
        # These import megatron-core.
        from megatron_rb.rehearsal.oracle import Oracle
        from megatron_rb.rehearsal.rank import Instruments, rehearse_rank
        from megatron_rb.rehearsal.watch import Watch
        from megatron_rb.rehearsal.weights import stand_in_for_weights

        for rank in job.ranks:
            memory = DeviceMemory()
            watch = Watch(memory, waits, messages, Oracle(), is_pinned)
            with StandIns() as own:
                stand_in_for_weights(own, watch)
                own.set(FakeTensor, "tolist", lambda tensor, watch=watch: watch.read_all(tensor))
                tools = Instruments(memory, waits, messages, launches, watch)
                record = rehearse_rank(config, job.mix, rank, job.world_size, job.steps, tools)
            partial = folder / f"rank_{rank}.part"
            partial.write_bytes(pickle.dumps(record))
            partial.rename(folder / f"rank_{rank}.pickle")
