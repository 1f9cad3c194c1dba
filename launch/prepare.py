"""From a checked config to a `JobSpec`, and everything that can be known to be wrong before anything starts."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_rb.config.derive import Derived
from megatron_rb.config.schema import Config, SlurmConfig
from megatron_rb.launch.command import check_environment, threads_per_rank
from megatron_rb.launch.handed_on import check_secrets
from megatron_rb.launch.hostfile import check_hosts, read_hosts
from megatron_rb.launch.job import WORKER, Host, JobSpec, Patience, SshSpec
from megatron_rb.launch.record import load_record
from megatron_rb.launch.time_limit import asked_limit, check_warning

TRAINING = "megatron_rb.app.main:train_folder"
LAUNCHERS = {
    "local": ("direct",),
    "ssh": ("torchrun", "direct", "ft_launcher"),
    "slurm": ("srun", "torchrun", "ft_launcher"),
}
"""What may start the processes of a machine; the first is the default."""


def build_job(config: Config, derived: Derived) -> JobSpec:
    """The job of a config.

    Raises:
        ValueError: machines, launcher or environment do not fit.
    """
    cluster = config.cluster
    run_dir = Path(os.path.abspath(derived.run_dir))
    earlier = load_record(run_dir)
    hosts = _hosts(config, derived.processes_per_node)
    python = cluster.python or sys.executable
    job = JobSpec(
        module=WORKER,
        arguments=(TRAINING, str(run_dir)),
        processes=derived.processes_per_node,
        run_dir=run_dir,
        master_addr=cluster.master_addr,
        master_port=cluster.master_port,
        threads_per_rank=_threads(config, derived.processes_per_node),
        env=run_environment(config),
        name=config.name,
        run_id=earlier.run_id if earlier is not None else new_run_id(config.name),
        engine=cluster.name,
        launcher=_launcher(config),
        nodes=cluster.nodes,
        spare_nodes=cluster.spare_nodes,
        max_retries=cluster.max_retries,
        python=python,
        host_python=cluster.host_python or python,
        work_dir=Path.cwd(),
        checkpoint_dir=Path(os.path.abspath(derived.checkpoint_dir)),
        tp_size=derived.tp_size,
        pp_size=derived.pp_size,
        cp_size=derived.cp_size,
        after=_job_before(config),
        node_env=_node_environments(config, hosts),
        secrets=tuple(cluster.secrets),
        patience=Patience(
            cluster.grace_seconds,
            cluster.silence_seconds,
            cluster.hang_seconds,
            cluster.return_seconds,
            cluster.least_hang_seconds,
        ),
        ssh=SshSpec(hosts, tuple(cluster.ssh.options), cluster.ssh.fan_out, cluster.ssh.connect_seconds),
    )
    _check_nodes(job)
    if job.engine == "slurm":
        _check_slurm(cluster.slurm)
    return job


def job_for_machines(config: Config) -> JobSpec:
    """A job for `rb doctor`: the machines of a config, without a model, data or run folder."""
    cluster = config.cluster
    processes = cluster.processes_per_node or 2
    hosts = _hosts(config, processes)
    python = cluster.python or sys.executable
    job = JobSpec(
        module="",
        arguments=(),
        processes=processes,
        run_dir=Path(),
        master_addr=cluster.master_addr,
        master_port=cluster.master_port,
        env=run_environment(config),
        engine=cluster.name,
        nodes=len(hosts) or cluster.nodes,
        python=python,
        work_dir=Path.cwd(),
        ssh=SshSpec(hosts, tuple(cluster.ssh.options), cluster.ssh.fan_out, cluster.ssh.connect_seconds),
    )
    _check_nodes(job)
    return job


def in_folder(job: JobSpec, run_dir: Path, name: str) -> JobSpec:
    """The same job as one run of a sweep, in a folder of its own."""
    arguments = (*job.arguments[:-1], str(run_dir))
    checkpoints = run_dir / job.checkpoint_dir.relative_to(job.run_dir)
    return replace(job, run_dir=run_dir, checkpoint_dir=checkpoints, arguments=arguments, run_id=name)


def new_run_id(name: str) -> str:
    """`name-20260131-101530-3f2a`: unique, sorted by time."""
    plain = "".join(char if char.isalnum() or char in "_-" else "_" for char in name)
    return f"{plain}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def check_paths(config: Config, derived: Derived, needs_data: bool = True) -> None:
    """Files and folders that the run reads must be there; a run that is only looked at needs no data.

    Raises:
        ValueError: names the setting and the path that is missing.
    """
    wanted = {
        "data.tokenizer": [config.data.tokenizer],
        "data.chat_template": [config.data.chat_template],
        "data.media_root": [config.data.media_root],
        "cluster.slurm.template": [config.cluster.slurm.template],
        "checkpoint.init": [] if config.checkpoint.init == "random" else [config.checkpoint.init],
    }
    missing = [
        f"{setting}: there is no {path} (relative to {Path.cwd()})"
        for setting, paths in wanted.items()
        for path in filter(None, paths)
        if not Path(path).exists() and not _comes_later(config, path)
    ]
    for text in [*(missing_data(config) if needs_data else []), *missing]:
        raise ValueError(text)
    check_secrets(config.cluster.secrets, os.environ)


def missing_data(config: Config) -> list[str]:
    """A line for every data file that is not there, or for none being named."""
    if not config.data.train:
        return ["data.train is empty; name at least one jsonl file of conversations"]
    files = [("data.train", path) for path in config.data.train]
    files += [("data.evaluation", path) for path in config.data.evaluation]
    return [
        f"{setting}: there is no {path} (relative to {Path.cwd()})"
        for setting, path in files
        if not Path(path).exists() and not _comes_later(config, path)
    ]


def _comes_later(config: Config, path: str) -> bool:
    """Whether a run that this one waits for will have written the path."""
    after = config.cluster.after
    return bool(after) and not after.isdigit() and Path(os.path.abspath(path)).is_relative_to(os.path.abspath(after))


def _job_before(config: Config) -> str:
    """The Slurm job of the run that `cluster.after` names by its folder."""
    after = config.cluster.after
    if not after or after.isdigit():
        return after
    if config.cluster.name != "slurm":
        raise ValueError(
            f"cluster.after is for cluster=slurm, this is cluster={config.cluster.name}; start the runs in turn"
        )
    before = load_record(Path(after))
    if before is None or not before.job_id:
        raise ValueError(f"cluster.after: {after} is not the folder of a submitted run; submit that one first")
    return before.job_id


def _launcher(config: Config) -> str:
    engine, asked = config.cluster.name, config.cluster.launcher
    if asked == "auto":
        return LAUNCHERS[engine][0]
    if asked not in LAUNCHERS[engine]:
        raise ValueError(
            f"cluster.launcher {asked} does not start runs of cluster={engine}; use {' or '.join(LAUNCHERS[engine])}"
        )
    if asked == "ft_launcher" and shutil.which(asked) is None:
        raise ValueError("cluster.launcher ft_launcher is not installed; install nvidia-resiliency-ext or use torchrun")
    return asked


def _threads(config: Config, processes: int) -> int:
    configured = config.platform.threads_per_rank
    if config.cluster.name != "local":
        return configured or 1  # the cores of the other machines are not known here
    return threads_per_rank(configured, len(os.sched_getaffinity(0)), processes)


def run_environment(config: Config) -> dict[str, str]:
    """What the platform's vendor wants in the environment of every process, and what the site adds or replaces.

    Raises:
        ValueError: a variable that the launcher sets itself, or no name of one.
    """
    check_environment(config.platform.env, "platform.env")
    check_environment(config.cluster.env)
    # The same code on every machine as here.
    here = {"PYTHONPATH": os.environ["PYTHONPATH"]} if os.environ.get("PYTHONPATH") else {}
    return {**here, **config.platform.env, **config.cluster.env}


def _hosts(config: Config, processes: int) -> tuple[Host, ...]:
    ssh = config.cluster.ssh
    if config.cluster.name != "ssh":
        return ()
    if ssh.hosts and ssh.hostfile:
        raise ValueError("cluster.ssh.hosts and cluster.ssh.hostfile are both given; give one of them")
    if not ssh.hosts and not ssh.hostfile:
        raise ValueError("cluster=ssh needs machines; give cluster.ssh.hostfile=FILE or cluster.ssh.hosts=[a,b]")
    hosts = read_hosts(Path(ssh.hostfile)) if ssh.hostfile else check_hosts([Host(n) for n in ssh.hosts], "ssh.hosts")
    few = [host for host in hosts if host.slots and host.slots < processes]
    if few:
        raise ValueError(
            f"host {few[0].name} has {few[0].slots} slots, the run puts {processes} processes on a "
            f"machine; use cluster.processes_per_node={few[0].slots} and more nodes"
        )
    return hosts


def _node_environments(config: Config, hosts: Sequence[Host]) -> dict[str, dict[str, str]]:
    cluster = config.cluster
    for values in (*cluster.type_env.values(), *cluster.node_env.values()):
        check_environment(values)
    types = {host.type for host in hosts}
    strange = sorted(set(cluster.type_env) - types)
    if strange:
        known = ", ".join(sorted(types - {""})) or "no types"
        raise ValueError(f"cluster.type_env names the type {strange[0]}; the host file has {known}")
    names = {host.name for host in hosts}
    unknown = sorted(set(cluster.node_env) - names) if hosts else []
    if unknown:
        raise ValueError(f"cluster.node_env names {unknown[0]}, which is none of the hosts {', '.join(sorted(names))}")
    by_type = {host.name: dict(cluster.type_env[host.type]) for host in hosts if host.type in cluster.type_env}
    return {
        node: {**by_type.get(node, {}), **cluster.node_env.get(node, {})} for node in {**by_type, **cluster.node_env}
    }


def _check_slurm(slurm: SlurmConfig) -> None:
    setting, limit = asked_limit(slurm.time, slurm.options, os.environ)
    if limit:
        check_warning(setting, limit, slurm.warning_seconds)
    kept_back = [option for option in slurm.srun_options if option.strip().startswith("--export")]
    if kept_back:
        raise ValueError(
            f"cluster.slurm.srun_options holds {kept_back[0]}: the launcher tells the processes of an attempt where "
            f"they meet through the environment of srun; take it out, and set variables in cluster.env"
        )


def _check_nodes(job: JobSpec) -> None:
    wanted = job.nodes + job.spare_nodes
    if job.engine == "local" and wanted > 1:
        raise ValueError(
            f"cluster=local is this machine only, cluster.nodes is {job.nodes} and spare_nodes {job.spare_nodes}; "
            f"use cluster=ssh or cluster=slurm for several"
        )
    if job.engine == "ssh" and len(job.ssh.hosts) < wanted:
        raise ValueError(
            f"cluster.nodes {job.nodes} + spare_nodes {job.spare_nodes} need {wanted} hosts, {len(job.ssh.hosts)} are "
            f"given; add hosts or use fewer nodes"
        )
