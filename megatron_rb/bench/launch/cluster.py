"""A real Slurm cluster on this one machine: every node is a set of namespaces with its own host name and processes.

It needs root (or the right to make namespaces) and Debian's packages `slurmctld slurmd slurm-client munge`; with `sshd`
also `openssh-server`, with `accounting` also `slurmdbd mariadb-server`. Everything lies in one folder; nothing of the
machine's own configuration is written.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "unshare", "nsenter", "mount")

# Process 1 of a node. It starts slurmd (and sshd) once and then only reaps, so that a node lives on without its slurmd.
NODE_INIT = r"""
folder=$1 node=$2
hostname "$node"
mount -t proc proc /proc
mount --bind "$folder/hosts" /etc/hosts
export SLURM_CONF=$folder/slurm.conf
[ -e "$folder/sshd.$node" ] && /usr/sbin/sshd -f "$folder/sshd.$node" -E "$folder/log/sshd.$node"
while :; do
  if rm "$folder/run/$node.wanted" 2>/dev/null; then
    slurmd -D -N "$node" -f "$SLURM_CONF"
  fi
  sleep 0.1
done
"""


@dataclass(frozen=True)
class ClusterOptions:
    nodes: int = 4
    cpus: int = 8
    memory_mb: int = 8000
    sshd: bool = False
    """Run an SSH server in every node; see `SlurmCluster.ssh_config`."""
    accounting: bool = False
    """Run MariaDB and slurmdbd, so that `sacct` answers."""
    slurmd_timeout: int = 30
    """Seconds after which Slurm itself notices that a node is gone."""
    requeue_delay: int = 5
    """Seconds a requeued job waits at least (life time of a credential; Slurm takes 5 or more, else its 120)."""
    small_disk_mb: int = 0
    """Size of a file system of its own at `SlurmCluster.small_disk`; 0 = none."""
    extra: tuple[str, ...] = ()
    """Further lines of slurm.conf; `{folder}` is replaced."""


def missing_programs(options: ClusterOptions) -> list[str]:
    """Programs that the cluster needs and this machine lacks."""
    wanted = [*PROGRAMS, *(("sshd", "ssh") if options.sshd else ())]
    wanted += ["slurmdbd", "mariadbd"] if options.accounting else []
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return [name for name in wanted if shutil.which(name, path=path) is None]


def unusable_because(options: ClusterOptions) -> str:
    """Why the cluster cannot run here, in a few words; empty = it can."""
    missing = missing_programs(options)
    if missing:
        return f"{', '.join(missing)} not installed"
    try:
        subprocess.run(
            ["unshare", "--uts", "--pid", "--mount", "--fork", "true"], check=True, capture_output=True, timeout=20
        )
    except subprocess.CalledProcessError:
        return "no right to make namespaces (run as root)"
    return ""


@dataclass
class SlurmCluster:
    """`with SlurmCluster(ClusterOptions()) as cluster: ...`; every process of it ends with the block."""

    options: ClusterOptions = field(default_factory=ClusterOptions)
    folder: Path = field(init=False)
    port: int = field(init=False)
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict, init=False)

    def __enter__(self) -> SlurmCluster:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o755)
        for name in ("log", "run", "state", "munge"):
            (self.folder / name).mkdir()
        self.port = _free_port_range()
        try:
            if self.options.small_disk_mb:
                self.small_disk.mkdir()
                size = f"size={self.options.small_disk_mb}m"
                subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(self.small_disk)], check=True)
            self._write_files()
            self._start_all()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def nodes(self) -> list[str]:
        return [f"node{number}" for number in range(1, self.options.nodes + 1)]

    @property
    def env(self) -> dict[str, str]:
        """What the commands of Slurm need in their environment."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    @property
    def ssh_config(self) -> Path:
        """`ssh -F <this> node2`."""
        return self.folder / "ssh_config"

    @property
    def small_disk(self) -> Path:
        """A file system that is soon full."""
        return self.folder / "small"

    @property
    def broken_prolog(self) -> Path:
        """While this file names a node, Slurm's prolog fails there."""
        return self.folder / "broken_prolog"

    def command(self, *words: str, timeout: float = 30, check: bool = True) -> str:
        """Run a command of Slurm on the submitting side and return its output."""
        done = subprocess.run(
            words, env={**os.environ, **self.env}, capture_output=True, text=True, timeout=timeout, check=False
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stdout}{done.stderr}")
        return done.stdout

    def execute(self, node: str, *words: str, timeout: float = 30) -> str:
        """Run a command inside a node."""
        inside = ["nsenter", "-t", str(self._init_pid(node)), "-m", "-u", "-p", "--", *words]
        done = subprocess.run(
            inside, env={**os.environ, **self.env}, capture_output=True, text=True, timeout=timeout, check=False
        )
        return done.stdout

    def power_off(self, node: str) -> None:
        """Everything in the node dies at once, as when its power goes."""
        os.kill(self._init_pid(node), signal.SIGKILL)
        self.daemons.pop(node).wait(timeout=10)

    def power_on(self, node: str) -> None:
        """Start a node, or only the slurmd of one that lost it."""
        (self.folder / "run" / f"{node}.wanted").touch()
        if node not in self.daemons:
            spaces = ["unshare", "--uts", "--pid", "--mount", "--fork", "--kill-child"]
            self._start(node, [*spaces, "bash", "-c", NODE_INIT, "init", str(self.folder), node])

    def kill_slurmd(self, node: str) -> None:
        """Only the daemon dies; the node's jobs live on."""
        self.execute(node, "pkill", "-KILL", "-x", "slurmd")

    def declare_lost(self, node: str) -> None:
        """Do at once what Slurm does by itself when a node has not answered for SlurmdTimeout."""
        self.command("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")

    def wait_idle(self, count: int, seconds: float = 60) -> None:
        """Wait until so many nodes are idle."""
        wait_for(lambda: len(self._idle()) >= count, seconds, lambda: f"idle: {self._idle()}\n{self.errors()}")

    def errors(self) -> str:
        """The last complaints of all daemons."""
        lines = [
            line for log in (self.folder / "log").iterdir() for line in log.read_text(errors="replace").split("\n")
        ]
        return "\n".join([line for line in lines if "error" in line or "fatal" in line][-20:])

    def close(self) -> None:
        for node in [name for name in self.daemons if name.startswith("node")]:
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                self.power_off(node)
        for process in reversed(self.daemons.values()):
            process.terminate()
        for process in self.daemons.values():
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.daemons.clear()
        if self.small_disk.is_mount():
            subprocess.run(["umount", "-l", str(self.small_disk)], check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _idle(self) -> list[str]:
        return self.command("sinfo", "-h", "-N", "-t", "idle", "-o", "%N", check=False).split()

    def _init_pid(self, node: str) -> int:
        outer = self.daemons[node].pid
        children = Path(f"/proc/{outer}/task/{outer}/children")
        wait_for(lambda: bool(children.read_text().split()), 10, lambda: f"{node} did not start")
        return int(children.read_text().split()[0])

    def _start(self, name: str, words: Sequence[str]) -> None:
        path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
        with open(self.folder / "log" / f"{name}.out", "ab") as log:
            self.daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *words],  # nothing outlives these tests
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, **self.env, "PATH": path},
            )

    def _start_all(self) -> None:
        run, options = self.folder / "run", self.options
        self._start(
            "munged",
            [
                "munged",
                "--foreground",
                "--force",
                f"--key-file={self.folder}/munge/key",
                f"--socket={run}/munge",
                f"--pid-file={run}/munged.pid",
                f"--log-file={self.folder}/log/munged",
                f"--seed-file={self.folder}/munge/seed",
            ],
        )
        wait_for(lambda: (run / "munge").is_socket(), 10, self.errors)
        if options.accounting:
            self._start_accounting()
        self._start("slurmctld", ["slurmctld", "-D", "-c", "-f", str(self.folder / "slurm.conf")])
        for node in self.nodes:
            self.power_on(node)
        self.wait_idle(options.nodes, 60)

    def _start_accounting(self) -> None:
        data, sock = self.folder / "mysql", self.folder / "run" / "mysql"
        data.mkdir()
        shutil.chown(data, "mysql")
        (self.folder / "run").chmod(0o777)
        subprocess.run(
            [
                "mariadb-install-db",
                "--no-defaults",
                f"--datadir={data}",
                "--user=mysql",
                "--skip-test-db",
                "--auth-root-authentication-method=socket",
            ],
            check=True,
            capture_output=True,
            timeout=60,
        )
        self._start(
            "mariadbd",
            [
                "mariadbd",
                "--no-defaults",
                "--user=mysql",
                f"--datadir={data}",
                f"--socket={sock}",
                "--skip-networking",
                f"--pid-file={data}/pid",
                "--innodb-flush-log-at-trx-commit=0",
                "--innodb-buffer-pool-size=64M",
            ],
        )
        client = ["mariadb", "--no-defaults", "-S", str(sock), "-e"]
        wait_for(lambda: subprocess.run([*client, "select 1"], capture_output=True).returncode == 0, 30, self.errors)
        subprocess.run([*client, "create database slurm_acct_db"], check=True, timeout=20)
        (self.folder / "slurmdbd.conf").write_text(
            f"AuthType=auth/munge\nAuthInfo=socket={self.folder}/run/munge\nDbdHost=localhost\nDbdAddr=127.0.0.1\n"
            f"DbdPort={self.port + 1}\nSlurmUser=root\nLogFile={self.folder}/log/slurmdbd\n"
            f"PidFile={self.folder}/run/slurmdbd.pid\nStorageType=accounting_storage/mysql\nStorageHost=localhost\n"
            f"StorageUser=root\nStorageLoc=slurm_acct_db\n"
        )
        (self.folder / "slurmdbd.conf").chmod(0o600)
        self._start("slurmdbd", ["env", f"MYSQL_UNIX_PORT={sock}", "slurmdbd", "-D"])
        wait_for(
            lambda: (
                subprocess.run(
                    ["timeout", "3", "sacctmgr", "-n", "show", "cluster"],
                    env={**os.environ, **self.env},
                    capture_output=True,
                ).returncode
                == 0
            ),
            30,
            self.errors,
        )
        for entry in ("cluster emulated", "account users", "user root account=users"):
            self.command("sacctmgr", "-i", "-Q", "add", *entry.split(), check=False)

    def _write_files(self) -> None:
        folder, options = self.folder, self.options
        key = folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        names = [f"127.0.1.{number} {node}" for number, node in enumerate(self.nodes, 1)]
        (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
        leaves = [self.nodes[first : first + 2] for first in range(0, options.nodes, 2)]
        switches = [f"SwitchName=leaf{number} Nodes={','.join(leaf)}" for number, leaf in enumerate(leaves, 1)]
        switches.append(f"SwitchName=spine Switches=leaf[1-{len(leaves)}]")
        (folder / "topology.conf").write_text("\n".join([*switches, ""]))
        (folder / "plugstack.conf").touch()
        prolog = f'#!/bin/sh\n! grep -qsx "$SLURMD_NODENAME" {self.broken_prolog}\n'
        (folder / "prolog").write_text(prolog)
        (folder / "prolog").chmod(0o755)
        (folder / "slurm.conf").write_text("\n".join([*self._slurm_conf(), ""]))
        if _slurm_version() >= (23, 11):
            (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        if options.sshd:
            self._write_ssh_files()

    def _slurm_conf(self) -> list[str]:
        folder, options, port = self.folder, self.options, self.port
        storage = "none"
        if options.accounting:
            # For connections to slurmdbd the munge socket is named by StoragePass.
            storage = (
                f"slurmdbd\nAccountingStorageHost=127.0.0.1\nAccountingStoragePort={port + 1}\n"
                f"AccountingStoragePass={folder}/run/munge"
            )
        nodes = [
            f"NodeName={node} NodeHostname={node} NodeAddr=127.0.1.{number} Port={port + 10 + number} "
            f"CPUs={options.cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={options.cpus} ThreadsPerCore=1 "
            f"RealMemory={options.memory_mb} State=UNKNOWN"
            for number, node in enumerate(self.nodes, 1)
        ]
        return [
            "ClusterName=emulated",
            f"SlurmctldHost={socket.gethostname().split('.')[0]}(127.0.0.1)",
            "SlurmUser=root",
            "SlurmdUser=root",
            "AuthType=auth/munge",
            f"AuthInfo=socket={folder}/run/munge,cred_expire={options.requeue_delay}",
            f"SlurmctldPort={port}",
            f"StateSaveLocation={folder}/state",
            f"SlurmdSpoolDir={folder}/spool-%n",
            f"SlurmctldPidFile={folder}/run/slurmctld.pid",
            f"SlurmdPidFile={folder}/run/slurmd-%n.pid",
            f"SlurmctldLogFile={folder}/log/slurmctld",
            f"SlurmdLogFile={folder}/log/slurmd-%n",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "JobAcctGatherType=jobacct_gather/none",
            "SwitchType=switch/none",
            "MpiDefault=none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core_Memory",
            "DefMemPerCPU=100",
            "SchedulerType=sched/backfill",
            "SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0",
            "SlurmdParameters=config_overrides",
            "SlurmctldTimeout=10",
            f"SlurmdTimeout={options.slurmd_timeout}",
            "InactiveLimit=0",
            "KillWait=5",
            "MinJobAge=3600",
            "CompleteWait=0",
            "WaitTime=0",
            "MessageTimeout=10",
            "ReturnToService=2",
            "JobRequeue=1",
            f"AccountingStorageType=accounting_storage/{storage}",
            f"Prolog={folder}/prolog",
            "PrologFlags=Alloc",
            "JobCompType=jobcomp/none",
            "TopologyPlugin=topology/tree",
            f"PlugStackConfig={folder}/plugstack.conf",
            *(line.format(folder=folder) for line in options.extra),
            *nodes,
            "PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP",
        ]

    def _write_ssh_files(self) -> None:
        Path("/run/sshd").mkdir(exist_ok=True)
        for name in ("host_key", "user_key"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)], check=True, timeout=20
            )
        shared = [
            f"HostKey {self.folder}/host_key",
            f"AuthorizedKeysFile {self.folder}/user_key.pub",
            "PidFile none",
            "StrictModes no",
            "UsePAM no",
            "PermitRootLogin prohibit-password",
            "PasswordAuthentication no",
        ]
        hosts = []
        for number, node in enumerate(self.nodes, 1):
            listen = f"ListenAddress 127.0.1.{number}:{self.port + 2}"
            (self.folder / f"sshd.{node}").write_text("\n".join([listen, *shared, ""]))
            hosts += [f"Host {node}", f"  HostName 127.0.1.{number}"]
        everywhere = [
            "Host *",
            f"  Port {self.port + 2}",
            f"  IdentityFile {self.folder}/user_key",
            "  LogLevel ERROR",
            "  UserKnownHostsFile /dev/null",
            "  StrictHostKeyChecking no",
        ]
        self.ssh_config.write_text("\n".join([*hosts, *everywhere, ""]))


def wait_for(condition: Callable[[], object], seconds: float, why: Callable[[], str] = lambda: "") -> None:
    """Wait until the condition holds; an AssertionError with `why()` after the time is over."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds:g} s: {why()}")
        time.sleep(0.1)


def _free_port_range() -> int:
    """A port that is free now, with free ones after it in all likelihood."""
    while True:
        first = 20000 + secrets.randbelow(9000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", first))
            return first


def _slurm_version() -> tuple[int, int]:
    text = subprocess.run(["slurmctld", "-V"], capture_output=True, text=True, check=True).stdout
    major, minor = text.split()[-1].split(".")[:2]
    return int(major), int(minor)
