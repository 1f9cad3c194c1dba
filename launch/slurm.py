"""Slurm by its command line: submit, ask, cancel; and the attempts of a job inside its allocation.

Text output with formats of our own is read: the shape of Slurm's JSON changes between its releases.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rb.launch.attempt import AttemptResult, Channel
from megatron_rb.launch.handed_on import check_secrets, exported_names, wished_export
from megatron_rb.launch.job import JobSpec
from megatron_rb.launch.local import free_port
from megatron_rb.launch.loop import Loop
from megatron_rb.launch.outer_job import for_submission, unused_wishes, without_filters, without_sizes
from megatron_rb.launch.plan import AttemptPlan, stacks_dir
from megatron_rb.launch.record import COMPLETED, FAILED, QUEUED, RUNNING, STOPPED
from megatron_rb.launch.topology import choose_nodes, leaf_of_nodes
from megatron_rb.launch.watch import AttemptWatch

COMMAND_SECONDS, ANSWER_SECONDS = 30, 1.5
PORTS = (20000, 29999)

_STATES = {
    **dict.fromkeys(("PENDING", "CONFIGURING", "REQUEUED", "SUSPENDED", "RESIZING", "SPECIAL_EXIT"), QUEUED),
    **dict.fromkeys(("REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD"), QUEUED),
    **dict.fromkeys(("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING"), RUNNING),
    "COMPLETED": COMPLETED,
    "CANCELLED": STOPPED,
    **dict.fromkeys(("FAILED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE", "PREEMPTED"), FAILED),
}


@dataclass(frozen=True)
class JobState:
    """What Slurm says about a job."""

    state: str
    """One of ours: QUEUED, RUNNING, COMPLETED, FAILED or STOPPED."""
    word: str
    """Slurm's own."""
    reason: str
    nodes: str


def is_installed() -> bool:
    """Whether Slurm's command line is on this machine."""
    return shutil.which("sbatch") is not None


def answers() -> bool:
    """Whether this machine has Slurm's commands and a controller behind them."""
    try:
        return (
            is_installed()
            and subprocess.run(["sinfo", "-h"], capture_output=True, timeout=ANSWER_SECONDS).returncode == 0
        )
    except subprocess.TimeoutExpired:
        return False


def submit(script: Path, handed_on: Sequence[str] = ()) -> str:
    """Submit a batch script; returns the job id. Nothing of a job around this process gets into the new one.

    Args:
        handed_on: variables of this environment that reach the job, whatever the site exports.

    Raises:
        ValueError: Slurm refuses the job, in its own words; or a variable to hand on is not set here.
    """
    check_secrets(handed_on, os.environ)
    unused = unused_wishes(os.environ)
    if unused:
        print(f"{', '.join(unused)} of this environment: not used, the batch script says it itself", file=sys.stderr)
    done = _try("sbatch", "--parsable", str(script), env=_submission(script, handed_on))
    return _output(done).partition(";")[0].strip()


def test_only(script: Path) -> str:
    """Slurm's estimate of when and where the job would start.

    Raises:
        ValueError: the job could never run as it is.
    """
    done = _try("sbatch", "--test-only", str(script), env=_submission(script))
    text = " ".join(line.removeprefix("sbatch: ").strip() for line in done.stderr.splitlines() if line.strip())
    if done.returncode:
        raise ValueError(f"Slurm would refuse this job: {text.removeprefix('allocation failure: ')}")
    return text


def job_state(job_id: str) -> JobState | None:
    """State of a job from squeue, else from sacct where there is accounting, else from scontrol; None = not known."""
    done = _try("squeue", "-h", "-j", job_id, "-t", "all", "-o", "%T|%r|%N")
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    if done.returncode == 0 and lines:
        word, reason, nodes = lines[0].strip().split("|")
        return _job_state(word, reason, nodes)
    if shutil.which("sacct"):
        done = _try("sacct", "-X", "-n", "-P", "-j", job_id, "-o", "State,Reason,NodeList")
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        if done.returncode == 0 and lines:
            word, reason, nodes = lines[-1].split("|")
            return _job_state(word, reason, nodes)
    words = dict(re.findall(r"(\w+)=(\S+)", _try("scontrol", "show", "job", "-o", job_id).stdout))
    if "JobState" in words:
        return _job_state(words["JobState"], words.get("Reason", ""), words.get("NodeList", ""))
    return None


def partition_limits(names: str) -> dict[str, str]:
    """Time limit, in Slurm's words, of a job that asks for none, by partition; empty where Slurm does not tell.

    Args:
        names: of partitions, comma-separated; empty = the cluster's default one.
    """
    of_some = ["-p", names] if names else []
    lines = _try("sinfo", "-h", "-o", "%P|%L|%l", *of_some).stdout.splitlines()
    rows = [line.strip().split("|") for line in lines if names or line.partition("|")[0].endswith("*")]
    return {name.rstrip("*"): most if usual == "n/a" else usual for name, usual, most in rows}


def jobs_of_run(run_id: str) -> list[str]:
    """Ids of the present jobs of a run, also when its record does not know them yet."""
    lines = _run("squeue", "-h", "-o", "%i|%k").splitlines()
    return [job for job, _, comment in (line.partition("|") for line in lines) if comment.strip() == run_id]


def cancel(job_id: str) -> None:
    """End a job now."""
    _run("scancel", job_id)


def ask_to_save(job_id: str) -> None:
    """Send the batch script the signal after which the run saves and leaves."""
    _run("scancel", "--batch", "--signal=USR1", job_id)


def release(job_id: str) -> None:
    """Let a held job start."""
    _run("scontrol", "release", job_id)


def requeue(job_id: str) -> None:
    """Have a job end and start again."""
    _run("scontrol", "requeue", job_id)


class SlurmEngine:
    """Attempts inside the allocation of the job that this process is part of.

    Args:
        srun: the command of the batch script that starts the ranks, one task per device.
    """

    def __init__(self, job: JobSpec, srun: Sequence[str], signals: list[int]) -> None:
        self.job, self.srun, self.signals = job, list(srun), signals
        self.job_id = os.environ["SLURM_JOB_ID"]
        # A task of an array is one job with an id of its own, yet scontrol wants to hear the name of the task.
        array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
        self.name = f"{array}_{task}" if array and task else self.job_id
        self.starting = ""
        self.step_id = ""

    def machines(self) -> list[str]:
        nodes = _expand(os.environ["SLURM_JOB_NODELIST"])
        leaves = leaf_of_nodes(_try("scontrol", "show", "topology").stdout, _expand)
        return list(choose_nodes(nodes, len(nodes), leaves))

    def answering(self, nodes: Sequence[str]) -> list[str]:
        found = []
        for node in nodes:
            probe = ["srun", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={node}", "--immediate=3", "true"]
            with contextlib.suppress(subprocess.TimeoutExpired):
                done = subprocess.run(probe, env=without_sizes(os.environ), capture_output=True, timeout=5)
                found += [node] if done.returncode == 0 else []
        return found

    def place_for_rank_zero(self, node: str, attempt: int) -> tuple[str, int]:
        address = self.job.master_addr or node
        if self.job.master_port:
            return address, self.job.master_port
        if node == os.environ.get("SLURMD_NODENAME"):
            return address, free_port("")
        # A new port each time: the old one may still be bound by what is left of the last attempt.
        return address, PORTS[0] + secrets.randbelow(PORTS[1] - PORTS[0])

    def run_attempt(self, plan: AttemptPlan, loop: Loop) -> AttemptResult:
        return AttemptWatch(self.job, plan, self, self.signals, loop.publish).run()

    def start(self, plan: AttemptPlan) -> list[Channel]:
        order = self.job.launch_dir / f"nodes_{plan.number}"
        tasks = self.job.processes if self.job.launcher == "srun" else 1
        order.write_text("".join(f"{node}\n" * tasks for node in plan.nodes))
        program, *options = self.srun
        command = [
            program,
            f"--nodes={len(plan.nodes)}",
            f"--ntasks={len(plan.nodes) * tasks}",
            "--distribution=arbitrary",
            "--export=ALL",
            "--no-kill",
            *options,
        ]
        env = without_sizes(os.environ) | {
            "SLURM_HOSTFILE": str(order),
            "MASTER_ADDR": plan.master_addr,
            "MASTER_PORT": str(plan.master_port),
            "RB_ATTEMPT": plan.id,
            "RB_NUMBER": str(plan.number),
            "RB_STACKS": str(stacks_dir(self.job.run_dir, plan.number)),
        }
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        return [Channel(process, plan.nodes)]

    def order(self, channels: Sequence[Channel], word: str) -> None:
        process = channels[0].process
        if word == "kill":
            self._kill(process)
        else:
            # srun hands these two on to every process of the step.
            process.send_signal(signal.SIGUSR1 if word == "stop" else signal.SIGUSR2)

    def queue_again(self, without: Sequence[str]) -> bool:
        done = _try("scontrol", "requeue", self.name)
        if done.returncode:
            return False
        end = time.monotonic() + 20
        while without and time.monotonic() < end:
            excluded = f"ExcNodeList={','.join(without)}"
            if _try("scontrol", "update", f"JobId={self.name}", excluded).returncode == 0:
                break
            time.sleep(0.2)
        time.sleep(20)  # Slurm ends this script now
        return True

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        """End the step on the nodes that still answer, without waiting for one that does not."""
        if process.poll() is None:
            steps = self._steps()
            if steps:  # not waited for: a node that is gone would hold it up
                subprocess.Popen(
                    ["scancel", "--quiet", "--signal=KILL", *steps],
                    start_new_session=True,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            process.terminate()

    def _steps(self) -> list[str]:
        """Steps of this job that run ranks; only its own, by id."""
        text = _try("squeue", "-h", "-s", "-j", self.job_id, "-o", "%i").stdout
        return [step for step in text.split() if step.rpartition(".")[2].isdigit()]


def _job_state(word: str, reason: str, nodes: str) -> JobState:
    word = word.split()[0].rstrip("+")  # `CANCELLED by 0`
    held = "held" in reason.lower()
    return JobState(_STATES.get(word, QUEUED if held else FAILED), word, reason, nodes)


def _submission(script: Path, handed_on: Sequence[str] = ()) -> dict[str, str]:
    """Environment of `sbatch`. Its option `--export` comes in here: a command line can be read by others."""
    env = for_submission(os.environ, handed_on)
    if handed_on:
        env["SBATCH_EXPORT"] = exported_names(handed_on, wished_export(script.read_text(), os.environ))
    return env


def _expand(nodes: str) -> list[str]:
    return _run("scontrol", "show", "hostnames", nodes).split() if nodes else []


def _run(*words: str) -> str:
    return _output(_try(*words))


def _output(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode:
        text = " ".join((done.stderr or done.stdout).split())
        raise ValueError(f"{done.args[0]} failed: {text.removeprefix(done.args[0] + ': error: ')}")
    return done.stdout


def _try(*words: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    env = without_filters(os.environ if env is None else env)
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=COMMAND_SECONDS, env=env)
    except FileNotFoundError:
        raise ValueError(f"{words[0]} is not on this machine; run this where Slurm's commands are") from None
    except subprocess.TimeoutExpired:
        raise ValueError(f"{words[0]} gave no answer within {COMMAND_SECONDS} s; is slurmctld up?") from None
