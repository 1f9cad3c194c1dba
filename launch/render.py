"""From a `JobSpec` to the exact scripts that machines run: text in, text out."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from megatron_rb.config.schema import SlurmConfig
from megatron_rb.launch.command import job_environment, rank_argv
from megatron_rb.launch.job import JobSpec
from megatron_rb.launch.outer_job import unset_words


def sbatch_script(job: JobSpec, slurm: SlurmConfig, gpus_per_node: int, runs: int = 0) -> str:
    """The batch script of a job.

    Args:
        gpus_per_node: devices asked for on a node; 0 = none.
        runs: of a sweep, whose folders `0`, `1`, ... lie in the run folder; 0 = one run.

    Raises:
        ValueError: the site's template cannot be read or uses a name that does not exist.
    """
    limit = f"%{slurm.array_limit}" if slurm.array_limit else ""
    values = {
        "job": job,
        "slurm": slurm,
        "script": job.launch_dir / "job.sbatch",
        "gpus_per_node": gpus_per_node,
        "array": f"0-{runs - 1}{limit}" if runs else "",
        "srun_options": [*slurm.srun_options, *_pyxis(job, slurm)],
        "container": _apptainer(job, slurm),
        "unset_words": unset_words(_requests(slurm, gpus_per_node)),
        "task_script": "rank.sh" if job.launcher == "srun" else "node.sh",
        "task_unit": "device" if job.launcher == "srun" else "node",
    }
    return _render(slurm.template or "sbatch.j2", values)


def rank_script(job: JobSpec) -> str:
    """What srun or torchrun starts once per device."""
    return _render("rank.j2", {"job": job, "command": shlex.join(rank_argv(job))})


def host_script(job: JobSpec, node: str) -> str:
    """What ssh starts on a machine; its arguments are the values that differ between attempts."""
    script = shlex.quote(str(job.launch_dir / "rank.sh"))
    per_node = job.processes
    if job.launcher == "direct":
        # shellcheck-clean on purpose: a site reads and edits this.
        command = (
            "bash -c 'for i in $(seq 0 "
            + str(per_node - 1)
            + f"); do RANK=$((NODE_RANK * {per_node} + i)) LOCAL_RANK=$i WORLD_SIZE={job.world_size} "
            + f'LOCAL_WORLD_SIZE={per_node} bash "$0" & done; wait\' {script}'
        )
    else:
        command = _launcher_command(job)
    return _render("host.j2", {"job": job, "node": node, "command": command, "environment": export_lines(job, node)})


def node_script(job: JobSpec) -> str:
    """What srun starts once per machine where another launcher starts the processes."""
    return _render("node.j2", {"job": job, "command": _launcher_command(job)})


def _launcher_command(job: JobSpec) -> str:
    """torchrun or ft_launcher on one machine. Static rendezvous keeps the order of machines; restarts are our own."""
    script = shlex.quote(str(job.launch_dir / "rank.sh"))
    program = shlex.quote(job.python) + " -m torch.distributed.run" if job.launcher == "torchrun" else job.launcher
    return (
        f"{program} --nnodes={job.nodes} --nproc-per-node={job.processes} --node-rank=$NODE_RANK --max-restarts=0 "
        f'--master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --no-python bash {script}'
    )


def environment_script(job: JobSpec) -> str:
    """The environment of every process, for machines whose names are known only when the job runs."""
    lines = ["# Environment of every process of this run.", *export_lines(job, "")]
    if job.node_env:
        lines.append('case "${SLURMD_NODENAME:-$(hostname -s)}" in')
        for node, values in job.node_env.items():
            lines += [f"  {shlex.quote(node)})", *(f"    {line}" for line in _exports(values)), "    ;;"]
        lines.append("esac")
    return "\n".join([*lines, ""])


def export_lines(job: JobSpec, node: str) -> list[str]:
    """`export NAME='value'` for every variable of a machine; secrets are not among them."""
    return _exports({**job_environment(job), **job.node_env.get(node, {})})


def _exports(values: Mapping[str, str]) -> list[str]:
    return [f"export {name}={shlex.quote(value)}" for name, value in values.items()]


def _requests(slurm: SlurmConfig, gpus_per_node: int) -> list[str]:
    """Options of the job that Slurm passes on to its steps by their environment."""
    own = {"gpus-per-node": gpus_per_node, "cpus-per-task": slurm.cpus_per_task}
    return [*(f"--{name}={value}" for name, value in own.items() if value), *slurm.options]


def _pyxis(job: JobSpec, slurm: SlurmConfig) -> Sequence[str]:
    if not slurm.container_image or slurm.container_runtime != "pyxis":
        return []
    # Named by the job, so that no state of another job's container is met.
    return [f"--container-image={slurm.container_image}", f"--container-mounts={','.join(_mounts(job, slurm))}"]


def _apptainer(job: JobSpec, slurm: SlurmConfig) -> str:
    if not slurm.container_image or slurm.container_runtime != "apptainer":
        return ""
    return f"apptainer exec --nv --bind {','.join(_mounts(job, slurm))} {shlex.quote(slurm.container_image)} "


def _mounts(job: JobSpec, slurm: SlurmConfig) -> list[str]:
    own = [f"{folder}:{folder}" for folder in dict.fromkeys((job.run_dir, job.work_dir, job.checkpoint_dir))]
    return [*own, "/dev/shm:/dev/shm", *slurm.container_mounts]


def _render(template: str, values: Mapping[str, Any]) -> str:
    site = Path(template)
    own = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.FileSystemLoader(site.parent), own]) if site.is_file() else own,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters |= {"quote": lambda value: shlex.quote(str(value)), "option": _option, "pattern": _pattern}
    try:
        return environment.get_template(site.name).render(values)
    except jinja2.TemplateNotFound as error:
        raise ValueError(f"there is no template {template}; set cluster.slurm.template to a file") from error
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", None)
        raise ValueError(f"{template}{f', line {line}' if line else ''}: {error}") from error


def _option(value: object) -> str:
    """A value of an `#SBATCH` line, which knows double quotes and the backslash but no variables."""
    text = str(value)
    if text and all(char.isalnum() or char in "_./:,[]%@+=-" for char in text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _pattern(value: object) -> str:
    """A file name in which Slurm shall replace nothing."""
    return _option(str(value).replace("%", "%%"))
