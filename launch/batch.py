"""The process that keeps a run going: `python -m megatron_rb.launch.batch RUN_DIR [-- srun ...]`.

Under Slurm it is what the batch script becomes; elsewhere `rb launch` starts it. Standard library only.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_rb.config.failures import without_room
from megatron_rb.config.open_files import raise_open_files
from megatron_rb.launch.job import JobSpec, load_job
from megatron_rb.launch.loop import Engine, Loop
from megatron_rb.launch.one_machine import LocalEngine
from megatron_rb.launch.slurm import SlurmEngine
from megatron_rb.launch.ssh import SshEngine
from megatron_rb.launch.supervise import caught_signals


def carry_on(job: JobSpec, srun: Sequence[str] = ()) -> int:
    """Run a prepared run to its end; returns the exit code of the job."""
    with caught_signals() as received:
        here = f"{socket.gethostname()}:{os.getpid()}"
        job_id = os.environ["SLURM_JOB_ID"] if job.engine == "slurm" else here
        loop = Loop(job, build_engine(job, srun, received), received, job_id)
        try:
            return loop.run()
        except OSError as error:
            if without_room(error) is None:
                raise
            return loop.cannot_write(error)


def build_engine(job: JobSpec, srun: Sequence[str], received: list[int]) -> Engine:
    """What starts the processes of the job.

    Args:
        received: signals sent to this process; grows while the engine waits.
    """
    if job.engine == "slurm":
        return SlurmEngine(job, srun, received)
    return SshEngine(job, received) if job.engine == "ssh" else LocalEngine(job, received)


def main(argv: Sequence[str]) -> int:
    run_dir, *srun = argv
    raise_open_files()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the terminal of `rb launch` may close
    return carry_on(load_job(Path(run_dir)), [word for word in srun if word != "--"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
