"""The run folder: who may use it, and what is written into it before anything starts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import Any

from megatron_rb.config.compose import CONFIG_FILE, config_from_file, save_config
from megatron_rb.config.locks import lock_exclusively
from megatron_rb.config.schema import Config
from megatron_rb.launch.job import JOB_FILE, JobSpec, load_job, write_whole
from megatron_rb.launch.record import newest_checkpoint
from megatron_rb.launch.render import environment_script, host_script, node_script, rank_script, sbatch_script
from megatron_rb.launch.topology import rank_table, table_text

FIXED = (
    "model.hf_path",
    "model.dtype",
    "model.freeze",
    "seed",
    "task",
    "data.train",
    "data.system_prompt",
    "data.seq_length",
    "data.max_patches",
    "data.global_batch_size",
    "data.global_micro_batches",
    "data.min_pixels",
    "data.max_pixels",
    "data.shuffle",
    "optimizer",
    "schedule.decay",
    "schedule.warmup_ratio",
)
"""Settings that a run keeps from its first step to its last; anything else may change when it is continued."""
PATHS = ("model.hf_path", "data.train")
"""Those of them that name files; a file is the same however its path is written."""


@contextmanager
def own_folder(run_dir: Path) -> Iterator[None]:
    """Two runs in one folder would overwrite each other's checkpoints; the lock goes with the launcher's end.

    Raises:
        ValueError: another launch holds the folder.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / "launch.lock", "a+") as lock:
        try:
            lock_exclusively(lock, run_dir)
        except BlockingIOError as error:
            lock.seek(0)
            raise ValueError(
                f"{run_dir} is in use by another launch (process {lock.read().strip()}); "
                f"wait for it, or choose another folder with name=... or run_dir=..."
            ) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


@contextmanager
def nothing_left_behind(run_dir: Path) -> Iterator[None]:
    """Take away a run folder that this call made, when what follows fails or is interrupted."""
    first = next((path for path in reversed((run_dir, *run_dir.parents)) if not path.exists()), None)
    try:
        yield
    except BaseException:
        if first is not None:
            shutil.rmtree(run_dir, ignore_errors=True)
            for folder in run_dir.parents:
                if not folder.is_relative_to(first) or any(folder.iterdir()):
                    break
                folder.rmdir()
        raise


def check_same_run(config: Config, job: JobSpec) -> None:
    """A folder with checkpoints belongs to one run.

    Raises:
        ValueError: names the settings that differ from those of the run in the folder; or fewer steps are asked for
            than it has made.
    """
    path = job.run_dir / CONFIG_FILE
    if not path.is_file() or not newest_checkpoint(job.checkpoint_dir):
        return
    try:
        there = config_from_file(path)
    except ValueError as error:
        raise ValueError(
            f"{job.run_dir} holds a run that cannot be continued ({error}); choose another run_dir"
        ) from error
    earlier_dir = load_job(job.run_dir).work_dir if (job.launch_dir / JOB_FILE).is_file() else job.work_dir
    different = [
        f"{key} is {_shown(theirs)} there and {_shown(ours)} here"
        for name in FIXED
        for key, theirs, ours in _differences(
            name, _value(there, name, earlier_dir), _value(config, name, job.work_dir)
        )
    ]
    if different:
        raise ValueError(
            f"{job.run_dir} holds the run of another config: {'; '.join(different)}; choose another run_dir, "
            f"or repeat its settings to continue it"
        )
    steps, made = config.schedule.train_steps, newest_checkpoint(job.checkpoint_dir)
    if 0 < steps < made:
        raise ValueError(
            f"{job.run_dir} holds a run of {made} steps and schedule.train_steps is {steps}; ask for {made} or more, "
            f"or choose another run_dir"
        )


def write_folder(config: Config, job: JobSpec) -> list[Path]:
    """Write config, scripts, environment and rank table of a run; returns the files in reading order."""
    for name in ("logs", "launch"):
        (job.run_dir / name).mkdir(parents=True, exist_ok=True)
    save_config(config, job.run_dir / CONFIG_FILE)
    job.save()
    launch = job.launch_dir
    files = {launch / "environment.sh": environment_script(job)}
    if job.engine == "slurm":
        nodes = [f"node-{number}" for number in range(job.nodes)]
        files[launch / "job.sbatch"] = sbatch_script(job, config.cluster.slurm, gpus_per_node(config, job.processes))
    else:
        nodes = [host.name for host in job.ssh.hosts][: job.nodes] or ["localhost"]
    if job.engine != "local":
        files[launch / "rank.sh"] = rank_script(job)
    if job.engine == "slurm" and job.launcher != "srun":
        files[launch / "node.sh"] = node_script(job)
    for host in job.ssh.hosts:
        files[launch / "hosts" / f"{host.name}.sh"] = host_script(job, host.name)
    files[launch / "ranks.txt"] = table_text(rank_table(job, nodes))
    for path, text in files.items():
        write_whole(path, text, mode=0o755 if path.suffix in (".sh", ".sbatch") else 0o644)
    return [job.run_dir / CONFIG_FILE, *files]


def gpus_per_node(config: Config, processes: int) -> int:
    """Devices that a job asks for on a node."""
    asked = config.cluster.slurm.gpus_per_node
    if asked >= 0:
        return asked
    return 0 if config.platform.name == "cpu" else processes


def _value(config: Config, name: str, work_dir: Path) -> Any:
    """A setting; paths as they are found from the folder that the run is started in."""
    value = attrgetter(name)(config)
    if name not in PATHS:
        return value
    paths = [str((work_dir / path).resolve()) for path in ([value] if isinstance(value, str) else value)]
    return paths[0] if isinstance(value, str) else paths


def _differences(name: str, theirs: Any, ours: Any) -> Iterator[tuple[str, Any, Any]]:
    if not hasattr(theirs, "__dataclass_fields__"):
        if theirs != ours:
            yield name, theirs, ours
        return
    there, here = asdict(theirs), asdict(ours)
    yield from ((f"{name}.{key}", there[key], here[key]) for key in there if there[key] != here[key])


def _shown(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)
