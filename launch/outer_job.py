"""What an environment carries from a job, a step or a world of processes around it, and who must not see it.

Slurm puts the sizes, memory and binding of a step into the environment of its tasks, `sbatch` hands all of it on, and
the `srun` of the new job obeys it (sbatch(1), srun(1), "INPUT ENVIRONMENT VARIABLES"). torchrun and MPI name ranks so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

CONTROLLER = ("SLURM_CONF", "SLURM_JWT", "SLURM_CLUSTERS", "SLURM_SACK_", "SLURM_DEBUG_FLAGS", "SLURM_TIME_FORMAT")
"""Beginnings of what Slurm's commands need to reach the controller; stays."""
RANKS = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "ROLE_RANK",
    "ROLE_NAME",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "RB_RUN_ID",
    "RB_ATTEMPT",
    "RB_FENCE",
    "RB_BEATS",
    "RB_STACKS",
    "RB_NUMBER",
    "RB_NODE",
)
"""Names by which a process of another world knows its place."""
RANK_GROUPS = ("TORCHELASTIC_", "PMI_", "PMI2_", "PMIX_", "OMPI_", "PRTE_", "MPI_LOCAL")
"""Beginnings of further ones."""
DEVICES = (
    "CUDA_VISIBLE_DEVICES",
    "MUSA_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ZE_AFFINITY_MASK",
    "GPU_DEVICE_ORDINAL",
)
"""Devices of a step; Slurm gives every step its own."""
SIZES = (
    "SLURM_NTASKS",
    "SLURM_NPROCS",
    "SLURM_NNODES",
    "SLURM_TASKS_PER_NODE",
    "SLURM_NTASKS_PER_NODE",
    "SLURM_JOB_NUM_NODES",
    "SLURM_DISTRIBUTION",
)
"""Sizes of a job, which contradict those of a step with fewer nodes."""
REQUESTS = (
    "SLURM_CPU_BIND",
    "SLURM_CPU_FREQ_REQ",
    "SLURM_MEM_BIND",
    "SRUN_CPUS_PER_TASK",
    "SLURM_TRES_",
    "SLURM_GRES",
    "SLURM_STEP_",
    "SLURM_HINT",
    "SLURM_CORE_SPEC",
    "SLURM_THREAD_SPEC",
    "SLURM_DIST_PLANESIZE",
    "SLURM_HOSTFILE",
    "SLURM_EXACT",
    "SLURM_EXCLUSIVE",
    "SLURM_EXPORT_ENV",
    "SRUN_EXPORT_ENV",
    "SLURM_TIMELIMIT",
    "SLURM_WAIT",
    "SLURM_IMMEDIATE",
    "SLURM_STD",
    "SLURM_LABELIO",
    "SLURM_WORKING_DIR",
    "SLURM_REMOTE_CWD",
    "SLURM_RESV_PORTS",
    "SLURM_MPI_TYPE",
    "SLURM_PROLOG",
    "SLURM_EPILOG",
    "SLURM_TASK_PROLOG",
    "SLURM_TASK_EPILOG",
)
"""Beginnings of what an `srun` takes for its options and no `sbatch` sets for its own job."""
SHARED_REQUESTS = (
    "SLURM_MEM_PER_CPU",
    "SLURM_MEM_PER_GPU",
    "SLURM_MEM_PER_NODE",
    "SLURM_CPUS_PER_TASK",
    "SLURM_CPUS_PER_GPU",
    "SLURM_GPUS",
    "SLURM_GPUS_PER_NODE",
    "SLURM_GPUS_PER_TASK",
    "SLURM_GPUS_PER_SOCKET",
    "SLURM_GPU_BIND",
    "SLURM_GPU_FREQ",
    "SLURM_NTASKS_PER_CORE",
    "SLURM_NTASKS_PER_GPU",
    "SLURM_NTASKS_PER_SOCKET",
    "SLURM_THREADS_PER_CORE",
    "SLURM_OVERCOMMIT",
)
"""Such options that an `sbatch` sets too, for a job that was submitted with them."""
OWN_OPTIONS = (
    "SBATCH_ARRAY_INX",
    "SBATCH_ERROR",
    "SBATCH_NO_REQUEUE",
    "SBATCH_OPEN_MODE",
    "SBATCH_OUTPUT",
    "SBATCH_SIGNAL",
    "SBATCH_WAIT",
)
"""Of the user's own wishes for all jobs, those that would take from the launcher what it works by."""
FILTERS = ("SQUEUE_", "SINFO_", "SACCT_", "SCANCEL_")
"""Beginnings of what narrows or rewords the answers of Slurm's commands for a person."""

_SHORT = {"c": "cpus-per-task", "G": "gpus", "O": "overcommit"}


def for_submission(env: Mapping[str, str], keep: Iterable[str] = ()) -> dict[str, str]:
    """The environment in which `sbatch` is called, so that a new job has nothing of the one around it.

    The user's own wishes for jobs (`SBATCH_*`) stay, but for those that `unused_wishes` names. `OMP_NUM_THREADS` stays:
    `environment.sh` sets it anew.

    Args:
        keep: names that stay in any case: the secrets of the run.
    """
    inside = "SLURM_JOB_ID" in env
    kept = frozenset(keep)
    return {
        name: value
        for name, value in without_ranks(env, kept).items()
        if name in kept or not (_is_of_a_job(name) or (name in DEVICES and inside))
    }


def unused_wishes(env: Mapping[str, str]) -> list[str]:
    """Variables of the user that `for_submission` leaves out, as the launcher needs these options for itself."""
    return [name for name in OWN_OPTIONS if name in env]


def without_ranks(env: Mapping[str, str], keep: Iterable[str] = ()) -> dict[str, str]:
    """An environment for processes of a new world; devices and cores stay those of the job around it."""
    kept = frozenset(keep)
    return {
        name: value for name, value in env.items() if name in kept or not (name in RANKS or _begins(name, RANK_GROUPS))
    }


def without_sizes(env: Mapping[str, str]) -> dict[str, str]:
    """For a step of this job, which may be smaller than the job."""
    return {name: value for name, value in env.items() if name not in SIZES}


def without_requests(env: Mapping[str, str]) -> dict[str, str]:
    """For an `srun` that says all it wants by its options; it stays in the job that it is called in."""
    plain = without_sizes(without_ranks(env))
    return {name: value for name, value in plain.items() if name not in SHARED_REQUESTS and not _begins(name, REQUESTS)}


def without_filters(env: Mapping[str, str]) -> dict[str, str]:
    """For commands whose answers a program reads."""
    return {name: value for name, value in env.items() if not _begins(name, FILTERS)}


def unset_words(options: Iterable[str]) -> str:
    """Words of the batch script's `unset`: all that it may have been submitted with, but what its own options set.

    Args:
        options: of the job itself, as `#SBATCH` lines have them, e.g. `--mem=900`.
    """
    own = {_variable(option) for option in options}
    foreign = [name for name in SHARED_REQUESTS if name not in own]
    return " ".join([*(f"${{!{name}@}}" for name in (*REQUESTS, *RANK_GROUPS)), *foreign, *RANKS, *DEVICES])


def _variable(option: str) -> str:
    """`SLURM_MEM_PER_NODE` of `--mem=900`: how Slurm tells the steps of a job about an option of the job."""
    word = (option.partition("=")[0].split() or [""])[0]
    name = word.removeprefix("--") if word.startswith("--") else _SHORT.get(word[1:2], "")
    return "SLURM_" + ("mem-per-node" if name == "mem" else name).replace("-", "_").upper()


def _is_of_a_job(name: str) -> bool:
    if name in OWN_OPTIONS or _begins(name, ("SBATCH_MEM_BIND", "SBATCH_CPU_BIND", "SLURMD_", "SRUN_", "SPANK_")):
        return True
    return name.startswith("SLURM_") and not _begins(name, CONTROLLER)


def _begins(name: str, beginnings: Iterable[str]) -> bool:
    return name.startswith(tuple(beginnings))
