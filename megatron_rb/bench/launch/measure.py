"""`rb bench launch`: how fast faults are overcome on the emulated cluster, and what that costs a large run."""

from __future__ import annotations

import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_rb.bench.launch.cluster import ClusterOptions, SlurmCluster, unusable_because, wait_for
from megatron_rb.bench.launch.runs import REPOSITORY, TinyRun
from megatron_rb.builders.build import SampleMix, write_split
from megatron_rb.checkpoint.hf.tiny import TinySize, conversation_texts, write_tiny_model
from megatron_rb.config.schema import SlurmConfig
from megatron_rb.launch.job import WORKER, JobSpec, write_whole
from megatron_rb.launch.prepare import TRAINING
from megatron_rb.launch.render import rank_script, sbatch_script
from megatron_rb.launch.simulate import FaultFigures, simulate_ettr
from megatron_rb.launch.topology import rank_table, table_text
from megatron_rb.shapes.families import NEWEST

EPISODES = REPOSITORY / "examples/robosim/heldout"
LARGE_NODES, LARGE_DEVICES = 128, 8
MEAN_TIME_TO_FAILURE = 7.9 * 3600
MODEL_START, CHECKPOINT_EVERY, CHECKPOINT_STALL = 180.0, 600.0, 3.0
"""Assumed for the large run, in seconds: they depend on model and file system and are not measured here."""


def measure() -> dict[str, Any]:
    """Measure, print and return all figures.

    Raises:
        ValueError: there is no Slurm here.
    """
    if not EPISODES.is_dir():
        raise ValueError(f"rb bench launch trains on {EPISODES}, which is not there; run it in the repository")
    reason = unusable_because(ClusterOptions())
    if reason:
        raise ValueError(f"rb bench launch needs Slurm on this machine: {reason}")
    with tempfile.TemporaryDirectory(prefix="bench-launch-") as name:
        figures = _faults(Path(name)) | _large_job(Path(name))
    notice = max(figures["node_notice_s"], figures["hang_notice_s"])
    faults = FaultFigures(
        MEAN_TIME_TO_FAILURE, notice, figures["restart_overhead_s"] + MODEL_START, CHECKPOINT_EVERY, CHECKPOINT_STALL
    )
    figures["simulated_ettr"] = round(simulate_ettr(faults, days=2000), 4)
    figures["simulated_with"] = (
        f"1,024 GPUs, MTTF 7.9 h; measured: notice {notice:.1f} s, restart without the model "
        f"{figures['restart_overhead_s']:.1f} s; assumed: model start {MODEL_START:.0f} s, checkpoint every "
        f"{CHECKPOINT_EVERY:.0f} s with a stall of {CHECKPOINT_STALL:.0f} s"
    )
    for key, value in figures.items():
        print(f"{key:<28}{value}")
    return figures


def _faults(folder: Path) -> dict[str, Any]:
    mix = SampleMix(tasks=("pointing", "uvd"), views=("side",), windows=0)
    write_split(EPISODES, folder, "heldout", mix, 0)
    write_tiny_model(
        conversation_texts(folder / "heldout.jsonl"), folder / "hf", family=NEWEST, size=TinySize(), seed=0
    )
    with SlurmCluster(ClusterOptions(nodes=3, slurmd_timeout=300)) as cluster:
        settings = ["cluster=slurm", "cluster.nodes=2", "cluster.processes_per_node=1", "cluster.spare_nodes=1"]
        run = TinyRun(
            folder, folder / "run", cluster, [*settings, "schedule.train_steps=100000", "checkpoint.save_every=100000"]
        ).start()
        moments = []
        for attempt, fault in enumerate(("kill", "hang", "power off"), 1):
            run.wait_attempt(attempt)
            run.wait_step(run.step + 3)
            moments.append(time.time())
            if fault == "power off":
                cluster.power_off(run.nodes()[1])
            else:
                run.signal_ranks(run.nodes()[1], "KILL" if fault == "kill" else "STOP")
        run.wait_attempt(4)
        wait_for(lambda: run.record.attempts[-1].started > 0, 10)
        run.act("stop", "--now")
        return _figures(run, moments)


def _figures(run: TinyRun, moments: list[float]) -> dict[str, Any]:
    notes, slowest = run.record.attempts, run.record.slowest["step"]
    assert [note.kind for note in notes[:3]] == ["rank", "hang", "node"], run.story()
    started = [note.started for note in notes]
    noticed = [_moment(note.noticed_at) for note in notes[:3]]
    first_steps = [_moment(note.first_step_at) for note in notes[:3]]
    return {
        "model_start_s": round(first_steps[0] - started[0], 1),
        "kill_to_next_attempt_s": round(started[1] - moments[0], 1),
        "kill_to_first_new_step_s": round(first_steps[1] - moments[0], 1),
        "hang_notice_s": round(noticed[1] - moments[1], 1),
        "hang_notice_limit_s": round(2 * slowest + 5, 1),
        "hang_to_first_new_step_s": round(first_steps[2] - moments[1], 1),
        "node_notice_s": round(noticed[2] - moments[2], 1),
        "node_to_next_attempt_s": round(started[3] - moments[2], 1),
        "restart_overhead_s": round(max(started[i + 1] - noticed[i] for i in range(3)), 1),
    }


def _moment(time_of_day: float | None) -> float:
    assert time_of_day is not None, "an attempt that made a step and failed has both moments"
    return time_of_day


def _large_job(folder: Path) -> dict[str, Any]:
    """Render a job of 128 nodes, then run `hostname` through its script on as many real slurmds."""
    own = folder / "large"
    template = folder / "hostname.j2"
    template.write_text('{% extends "sbatch.j2" %}\n{% block start %}\nsrun hostname\n{% endblock %}\n')
    job = JobSpec(
        WORKER,
        (TRAINING, str(own)),
        LARGE_DEVICES,
        own,
        nodes=LARGE_NODES,
        engine="slurm",
        launcher="srun",
        work_dir=folder,
        tp_size=8,
        pp_size=4,
    )
    started = time.monotonic()
    write_whole(own / "launch/job.sbatch", sbatch_script(job, SlurmConfig(), 0))
    write_whole(own / "launch/rank.sh", rank_script(job))
    write_whole(own / "launch/ranks.txt", table_text(rank_table(job, [f"node{n + 1}" for n in range(LARGE_NODES)])))
    rendered = time.monotonic() - started
    write_whole(own / "launch/environment.sh", "")
    (own / "logs").mkdir()
    script = own / "launch/hostname.sbatch"
    write_whole(script, sbatch_script(job, SlurmConfig(template=str(template), options=["--mem=1"]), 0))
    started = time.monotonic()
    with SlurmCluster(ClusterOptions(nodes=LARGE_NODES, cpus=LARGE_DEVICES)) as cluster:
        up = time.monotonic() - started
        started = time.monotonic()
        cluster.command("sbatch", "--wait", str(script), timeout=120)
        ran = time.monotonic() - started
    with suppress(FileNotFoundError):
        hosts = set((own / "logs/batch.log").read_text().split())
    return {
        "render_128_nodes_s": round(rendered, 2),
        "cluster_of_128_up_s": round(up, 1),
        "hostname_on_128_nodes_s": round(ran, 1),
        "hosts_that_answered": len(hosts),
    }
