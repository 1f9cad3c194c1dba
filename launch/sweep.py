"""Sweeps: every run gets a folder and a resolved config; under Slurm all of them are one job array."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_rb.config.schema import Config
from megatron_rb.launch import slurm
from megatron_rb.launch.actions import Options, run, submit_array
from megatron_rb.launch.folder import gpus_per_node, nothing_left_behind, own_folder, write_folder
from megatron_rb.launch.job import JobSpec, write_whole
from megatron_rb.launch.prepare import in_folder
from megatron_rb.launch.render import sbatch_script
from megatron_rb.launch.time_limit import check_partition


def launch_sweep(prepared: Sequence[tuple[Config, JobSpec]], options: Options) -> int:
    """Start all runs: as one array under Slurm, else one after the other; their folders are `0`, `1`, ...

    Raises:
        ValueError: the folder holds another sweep or a run.
    """
    root = prepared[0][1].run_dir
    if any(job.run_dir != root for _, job in prepared):
        raise ValueError("the runs of a sweep share run_dir; sweep over settings of the model, data or optimizer")
    if (root / "config.yaml").exists() or (root / "0").exists():
        raise ValueError(f"{root} holds a run or a sweep already; choose another run_dir")
    runs = [_placed(config, job, root, number) for number, (config, job) in enumerate(prepared)]
    if runs[0][1].engine != "slurm" and options.action == "run":
        return max(run(config, job, replace(options, follow=True)) for config, job in runs)
    with nothing_left_behind(root), own_folder(root):
        for config, job in runs:
            write_folder(config, job)
            print(f"{job.run_dir}: {job.run_id}")
        if runs[0][1].engine == "slurm":
            _array(prepared[0], [job for _, job in runs], options)
    return 0


def _array(first: tuple[Config, JobSpec], jobs: Sequence[JobSpec], options: Options) -> None:
    config, job = first
    script = job.launch_dir / "job.sbatch"
    text = sbatch_script(job, config.cluster.slurm, gpus_per_node(config, job.processes), runs=len(jobs))
    write_whole(script, text, mode=0o755)
    (job.run_dir / "logs").mkdir(exist_ok=True)
    if options.action == "dryrun":
        print(f"\n# {script}\n{text}")
        return
    check_partition(config.cluster.slurm, os.environ, slurm.partition_limits)
    slurm.test_only(script)
    print(f"array {submit_array(script, jobs)}")


def _placed(config: Config, job: JobSpec, root: Path, number: int) -> tuple[Config, JobSpec]:
    folder = root / str(number)
    placed = replace(config, run_dir=os.path.relpath(folder))
    return placed, in_folder(job, folder, f"{job.run_id}-{number}")
