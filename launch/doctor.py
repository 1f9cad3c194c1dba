"""`rb doctor`: starts a small check on every machine of a cluster and names those that are bad; imports no torch."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from megatron_rb.launch.job import JobSpec
from megatron_rb.launch.local import free_port
from megatron_rb.launch.outer_job import without_requests
from megatron_rb.launch.ssh import ssh_command

PROBE, REPORT = "megatron_rb.parallel.doctor", "rb-doctor "
SLOW = 0.7
"""Share of the median below which a rate counts as bad."""
CLOCK_SECONDS = 5.0
TIMEOUT_SECONDS = 300


def examine(job: JobSpec, platform: str) -> list[dict[str, Any]]:
    """The reports of all machines of a job.

    Raises:
        ValueError: a machine cannot run the check; with its last words.
    """
    port = free_port("") if job.engine == "local" else 20000 + os.getpid() % 9000
    words = [job.python, "-m", PROBE, platform, str(job.work_dir), str(job.master_port)]
    if job.engine == "local":
        commands = [[*_rank_words(job, rank, "127.0.0.1", port), *words] for rank in range(job.processes)]
    elif job.engine == "ssh":
        commands = _over_ssh(job, words, port)
    else:
        commands = [_srun(job, words, port)]
    outputs = _run_all(commands, job.work_dir)
    line = next((line for text in outputs for line in text.splitlines() if line.startswith(REPORT)), None)
    if line is None:
        said = [text.strip().splitlines()[-1] for text in outputs if text.strip()]
        raise ValueError(f"the check gave no report: {'; '.join(said[:3]) or 'no message'}")
    return json.loads(line.removeprefix(REPORT))


def findings(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is wrong, one line per machine and measurement; empty = nothing stands out."""
    found = []
    for measure, unit in (("matmul_tflops", "TFLOP/s in a matrix product"), ("within", "GB/s inside the machine")):
        rates = {report["host"]: report[measure] for report in reports if report.get(measure)}
        found += [
            _slow(host, rate, rates, unit) for host, rate in rates.items() if rate < SLOW * median(rates.values())
        ]
    paired = {report["host"]: max(report["pairs"].values()) for report in reports if report["pairs"]}
    if paired:
        # The better of its two links: one bad machine makes both links of its neighbours' slow on one side only.
        found += [
            _slow(host, rate, paired, "GB/s to other machines")
            for host, rate in paired.items()
            if rate < SLOW * median(paired.values())
        ]
    for name in ("platform", "devices", "libraries"):
        values = [json.dumps(report[name]) for report in reports]
        usual = max(set(values), key=values.count)
        found += [
            f"{report['host']}: {name} {value}, elsewhere {usual}"
            for report, value in zip(reports, values, strict=True)
            if value != usual
        ]
    found += [f"{report['host']}: {fault}" for report in reports for fault in report["faults"]]
    middle = median(report["clock"] for report in reports)
    found += [
        f"{report['host']}: its clock is {report['clock'] - middle:+.0f} s off"
        for report in reports
        if abs(report["clock"] - middle) > CLOCK_SECONDS
    ]
    found += [f"{report['host']}: port {report['port']}" for report in reports if "in use" in report["port"]]
    return found


def file_findings(reports: Sequence[Mapping[str, Any]], needed: int) -> list[str]:
    """Machines on which a rank may not open as many files as it needs."""
    return [
        f"{report['host']}: at most {report['open_files']} open files (hard limit), rank 0 or its store needs up to "
        f"{needed}; raise `nofile` in limits.conf, or LimitNOFILE of slurmd or sshd"
        for report in reports
        if report["open_files"] < needed
    ]


def files_line(reports: Sequence[Mapping[str, Any]], world: int, needed: int) -> str:
    """One sentence with the figures of `file_findings`."""
    least = min(report["open_files"] for report in reports)
    way = "lazily" if reports[0]["lazy_gloo"] else "at once"
    return (
        f"open files: a process of {world} ranks needs up to {needed} (gloo connects {way}), a process may have {least}"
    )


def table(reports: Sequence[Mapping[str, Any]]) -> str:
    """One line per machine."""
    lines = []
    for report in reports:
        pairs = ", ".join(f"{reports[int(other)]['host']} {rate}" for other, rate in report["pairs"].items())
        lines.append(
            f"{report['host']}: {report['platform']} x {report['devices']}, {report['cores']} cores, memory "
            f"{report['memory_free_gib']}/{report['memory_gib']} GiB free, disk {report['disk_free_gib']} GiB free, "
            f"matmul {report['matmul_tflops']} TFLOP/s, inside {report['within'] or '-'} GB/s, "
            f"to {pairs or 'nobody'} (GB/s), port {report['port']}"
            + (f"\n  {report['driver']}" if report["driver"] else "")
        )
    libraries = ", ".join(f"{name} {version}" for name, version in reports[0]["libraries"].items())
    return "\n".join([*lines, f"libraries: {libraries}"])


def _slow(host: str, rate: float, rates: Mapping[str, float], unit: str) -> str:
    return f"{host}: {rate} {unit}, the median is {median(rates.values()):.3g}"


def _rank_words(job: JobSpec, rank: int, address: str, port: int) -> list[str]:
    values = {
        **job.env,
        "RANK": rank,
        "LOCAL_RANK": rank % job.processes,
        "WORLD_SIZE": job.world_size,
        "LOCAL_WORLD_SIZE": job.processes,
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }
    return ["env", "OMP_NUM_THREADS=1", *(f"{name}={value}" for name, value in values.items())]


def _over_ssh(job: JobSpec, words: Sequence[str], port: int) -> list[list[str]]:
    hosts = [host.name for host in job.ssh.hosts][: job.nodes]
    address = job.master_addr or hosts[0].rpartition("@")[2]
    commands = []
    for rank in range(job.world_size):
        inside = shlex.join([*_rank_words(job, rank, address, port), *words])
        host = hosts[rank // job.processes]
        commands.append(ssh_command(job.ssh, host, f"cd {shlex.quote(str(job.work_dir))} && {inside}"))
    return commands


def _srun(job: JobSpec, words: Sequence[str], port: int) -> list[str]:
    # The address of rank 0 is known only inside the step; SLURM_PROCID and its like are read by the check itself.
    exports = shlex.join([f"{name}={value}" for name, value in job.env.items()])
    inside = (
        f"env OMP_NUM_THREADS=1 {exports} LOCAL_WORLD_SIZE={job.processes} MASTER_PORT={port} "
        f'MASTER_ADDR=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1) {shlex.join(words)}'
    )
    tasks = [f"--nodes={job.nodes}", f"--ntasks-per-node={job.processes}", "--kill-on-bad-exit=1", "--export=ALL"]
    # Inside an allocation its machines are checked, beside what runs there.
    beside = ["--overlap"] if "SLURM_JOB_ID" in os.environ else []
    return ["srun", *tasks, *beside, "bash", "-c", inside]


def _run_all(commands: Sequence[Sequence[str]], folder: os.PathLike[str]) -> list[str]:
    processes = [
        subprocess.Popen(
            words,
            cwd=folder,
            env=without_requests(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for words in commands
    ]
    end = time.monotonic() + TIMEOUT_SECONDS
    outputs = []
    for process in processes:
        try:
            outputs.append(process.communicate(timeout=max(0.1, end - time.monotonic()))[0].decode(errors="replace"))
        except subprocess.TimeoutExpired:
            process.kill()
            outputs.append(f"no answer within {TIMEOUT_SECONDS} s: {shlex.join(process.args)}")  # type: ignore[arg-type]
    return outputs
