"""Machines reached by the system's OpenSSH: bounded fan-out, one shared connection per machine, no pids guessed."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from megatron_rb.config.open_files import raise_open_files
from megatron_rb.launch.attempt import AttemptResult, Channel
from megatron_rb.launch.job import JobSpec, SshSpec
from megatron_rb.launch.loop import Loop
from megatron_rb.launch.plan import AttemptPlan
from megatron_rb.launch.watch import AttemptWatch

PORTS = (20000, 29999)


def ssh_command(spec: SshSpec, host: str, command: str) -> list[str]:
    """The words that run a shell command on a host, through a connection that later calls share."""
    control = Path(tempfile.gettempdir()) / f"rb-ssh-{os.getuid()}-%C"
    return [
        "ssh",
        *spec.options,
        "-o",
        "BatchMode=yes",
        "-o",
        f"ConnectTimeout={max(1, round(spec.connect_seconds))}",
        "-o",
        "ControlMaster=auto",
        "-o",
        f"ControlPath={control}",
        "-o",
        "ControlPersist=60",
        "-o",
        "ServerAliveInterval=5",
        "-o",
        "ServerAliveCountMax=3",
        "--",
        host,
        command,
    ]


def on_all(spec: SshSpec, hosts: Sequence[str], command: str) -> dict[str, subprocess.CompletedProcess[str]]:
    """Run a command on all hosts, at most `fan_out` at a time."""

    def run(host: str) -> subprocess.CompletedProcess[str]:
        words = ssh_command(spec, host, command)
        try:
            return subprocess.run(
                words, capture_output=True, text=True, timeout=spec.connect_seconds + 20, stdin=subprocess.DEVNULL
            )
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(words, 255, "", f"no answer within {spec.connect_seconds + 20:g} s")

    raise_open_files()
    with ThreadPoolExecutor(min(spec.fan_out, len(hosts)) or 1) as pool:
        return dict(zip(hosts, pool.map(run, hosts), strict=True))


def unreachable(spec: SshSpec, hosts: Sequence[str]) -> dict[str, str]:
    """Hosts on which no command can be run, with what ssh says."""
    answers = on_all(spec, hosts, "true")
    return {host: " ".join(done.stderr.split()) for host, done in answers.items() if done.returncode}


class SshEngine:
    """Attempts on the machines of a host file; this process is the one that all supervisors report to."""

    def __init__(self, job: JobSpec, signals: list[int]) -> None:
        self.job, self.signals = job, signals

    def machines(self) -> list[str]:
        return [host.name for host in self.job.ssh.hosts][: self.job.nodes + self.job.spare_nodes]

    def answering(self, nodes: Sequence[str]) -> list[str]:
        gone = unreachable(self.job.ssh, nodes)
        return [node for node in nodes if node not in gone]

    def place_for_rank_zero(self, node: str, attempt: int) -> tuple[str, int]:
        address = self.job.master_addr or node.rpartition("@")[2]
        return address, self.job.master_port or PORTS[0] + secrets.randbelow(PORTS[1] - PORTS[0])

    def run_attempt(self, plan: AttemptPlan, loop: Loop) -> AttemptResult:
        return AttemptWatch(self.job, plan, self, self.signals, loop.publish).run()

    def start(self, plan: AttemptPlan) -> list[Channel]:
        raise_open_files()
        with ThreadPoolExecutor(self.job.ssh.fan_out) as pool:
            return list(pool.map(lambda node: self._connect(plan, node), plan.nodes))

    def order(self, channels: Sequence[Channel], word: str) -> None:
        for channel in channels:
            with suppress(BrokenPipeError, ValueError):
                assert channel.process.stdin is not None
                channel.process.stdin.write(f"{word}\n".encode())
                channel.process.stdin.flush()

    def queue_again(self, without: Sequence[str]) -> bool:
        return False

    def _connect(self, plan: AttemptPlan, node: str) -> Channel:
        script = self.job.launch_dir / "hosts" / f"{node}.sh"
        values = (plan.number, plan.nodes.index(node), plan.master_addr, plan.master_port, plan.id)
        command = shlex.join(["bash", str(script), *map(str, values)])
        process = subprocess.Popen(
            ssh_command(self.job.ssh, node, command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert process.stdin is not None
        # Over the connection, and so in no command line, script or log.
        known = {name: os.environ[name] for name in self.job.secrets if name in os.environ}
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(known).encode() + b"\n")
            process.stdin.flush()
        return Channel(process, (node,))
