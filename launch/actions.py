"""What `rb launch action=...` does: run, dryrun, status, logs, stop, requeue."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rb.config.schema import Config
from megatron_rb.launch import slurm
from megatron_rb.launch.batch import carry_on
from megatron_rb.launch.folder import check_same_run, nothing_left_behind, own_folder, write_folder
from megatron_rb.launch.job import JobSpec, load_job
from megatron_rb.launch.local import check_port
from megatron_rb.launch.plan import STOP_FILE
from megatron_rb.launch.record import (
    COMPLETED,
    ENDED,
    QUEUED,
    RUNNING,
    STOPPED,
    RunRecord,
    load_record,
    now,
)
from megatron_rb.launch.ssh import on_all, unreachable
from megatron_rb.launch.status import all_runs, present_state, process_lives, run_status
from megatron_rb.launch.time_limit import check_partition
from megatron_rb.launch.verdict import kept

ACTIONS = ("run", "dryrun", "status", "logs", "stop", "requeue")
FOLLOW_SECONDS, STOP_SECONDS = 0.5, 600


@dataclass(frozen=True)
class Options:
    """What is asked of the launcher beside the settings of the run."""

    action: str = "run"
    follow: bool | None = None
    """Stay until the run has ended; None = as the engine does by default."""
    as_json: bool = False
    now: bool = False
    """Stop without saving."""
    rank: int | None = None
    """Whose log; None = the rank that failed, else rank 0."""
    rehearse: bool = False
    """Rehearse the run beside its dry run."""


def dry_run(config: Config, job: JobSpec) -> int:
    """Write the run folder, print what is in it, start nothing."""
    check_same_run(config, job)
    with nothing_left_behind(job.run_dir), own_folder(job.run_dir):
        files = write_folder(config, job)
        if job.engine == "slurm" and slurm.answers():
            print(f"# {slurm.test_only(job.launch_dir / 'job.sbatch')}")
    for path in files:
        print(f"\n# {path}\n{path.read_text().rstrip()}")
    return 0


def run(config: Config, job: JobSpec, options: Options) -> int:
    """Start a run, or continue the one in the folder; returns its exit code when it is followed, else 0."""
    check_same_run(config, job)
    _check_idle(job.run_dir)
    follow = options.follow if options.follow is not None else job.engine == "local"
    if job.engine == "ssh":
        _check_hosts(job)
    elif job.engine == "local" and job.master_port:
        check_port(job.master_addr or "127.0.0.1", job.master_port)
    if job.engine == "slurm":
        return _submit(config, job, follow)
    with own_folder(job.run_dir):
        with nothing_left_behind(job.run_dir):
            _open_record(config, job)
        if follow:
            print(f"{job.name}: {job.world_size} processes, logs in {job.run_dir / 'logs'}", flush=True)
            return carry_on(job)
        _start_in_background(job)
    print(job.run_id)
    return 0


def show_status(run_dir: Path | None, as_json: bool) -> int:
    """One line a run; without a folder for every run below `runs`."""
    found = [run_status(run_dir)] if run_dir is not None else list(all_runs(Path("runs")))
    for status in found:
        print(status.json() if as_json else status.line())
    return 0


def show_logs(run_dir: Path, options: Options) -> int:
    """Print a rank's log, and with `follow` what comes until the run has ended."""
    job, record = load_job(run_dir), load_record(run_dir)
    rank = options.rank if options.rank is not None else _interesting_rank(record)
    path = run_dir / "logs" / f"rank_{rank}.log"
    if not 0 <= rank < job.world_size:
        raise ValueError(f"there is no rank {rank}; the run has ranks 0 to {job.world_size - 1}")
    if not path.is_file() and not options.follow:
        raise ValueError(f"rank {rank} has written nothing yet ({path}); action=status says what the run waits for")
    shown = 0
    while True:
        ended = _has_ended(run_dir)
        if path.is_file():
            with open(path, "rb") as log:
                log.seek(shown)
                text = log.read()
            shown += len(text)
            sys.stdout.write(text.decode(errors="replace"))
            sys.stdout.flush()
        if not options.follow or ended:
            return 0
        time.sleep(FOLLOW_SECONDS)


def stop(run_dir: Path, at_once: bool) -> int:
    """Have the run save and leave, or end it at once; returns when it has ended."""
    record = load_record(run_dir)
    if record is None:
        raise ValueError(f"{run_dir} holds no run; give run_dir=... or name=... of one")
    state, _ = present_state(record)
    if state in ENDED:
        print(f"{record.run_id} is not running: {state}")
        return 0
    job = load_job(run_dir)
    (job.launch_dir / STOP_FILE).touch()
    if record.engine == "slurm":
        _stop_job(record, run_dir, state, at_once)
    else:
        _stop_process(record, at_once)
    print(run_status(run_dir).line())
    return 0


def requeue(run_dir: Path) -> int:
    """Have a Slurm job save, give its machines back and be queued again; or submit again a run that has ended."""
    job, record = load_job(run_dir), load_record(run_dir)
    if job.engine != "slurm" or record is None:
        raise ValueError(
            f"only a run of cluster=slurm can be queued again, {run_dir} is one of {job.engine}; use action=run"
        )
    state, reason = present_state(record)
    if state == RUNNING:
        slurm.ask_to_save(record.job_id)
        print(f"{record.run_id}: job {record.job_id} saves and is queued again")
    elif state == QUEUED and "held" in reason:
        slurm.release(record.job_id)
        print(f"{record.run_id}: job {record.job_id} was held and is released")
    elif state == QUEUED:
        print(f"{record.run_id}: job {record.job_id} is queued already")
    else:
        _check_unfinished(record)
        _submit_script(job, record)
        print(f"{record.run_id}: submitted again as job {record.job_id}")
    return 0


def submit_array(script: Path, jobs: Sequence[JobSpec]) -> str:
    """Submit the runs of a sweep as one array; returns its job id."""
    job_id = slurm.submit(script, jobs[0].secrets)
    for number, job in enumerate(jobs):
        RunRecord(job.run_id, job.name, job.engine, QUEUED, job_id=f"{job_id}_{number}", created=now()).save(
            job.run_dir
        )
    return job_id


def _submit(config: Config, job: JobSpec, follow: bool) -> int:
    if not slurm.is_installed():
        raise ValueError("sbatch is not on this machine; run this on a login node, or look at it with action=dryrun")
    check_partition(config.cluster.slurm, os.environ, slurm.partition_limits)
    with own_folder(job.run_dir), nothing_left_behind(job.run_dir):
        twins = slurm.jobs_of_run(job.run_id)
        if twins:
            raise ValueError(
                f"run {job.run_id} is queued or running already as job {', '.join(twins)}; stop it with action=stop, "
                f"or choose another run_dir"
            )
        record = _open_record(config, job)
        slurm.test_only(job.launch_dir / "job.sbatch")
        _submit_script(job, record)
    print(job.run_id, flush=True)
    return wait_for_end(job.run_dir) if follow else 0


def _submit_script(job: JobSpec, record: RunRecord) -> None:
    job_id = slurm.submit(job.launch_dir / "job.sbatch", job.secrets)
    started = load_record(job.run_dir) or record
    if started.job_id != job_id:  # else the job has begun already and keeps the record itself
        record.job_id, record.state, record.reason = job_id, QUEUED, ""
        record.launched_at, record.ended, record.exit_code = len(record.attempts), None, None
        record.save(job.run_dir)


def wait_for_end(run_dir: Path) -> int:
    """Copy rank 0's log to the console until the run has ended; returns the exit code of its job."""
    show_logs(run_dir, Options(follow=True, rank=0))
    status, record = run_status(run_dir), load_record(run_dir)
    print(status.line(), file=sys.stderr)
    code = record.exit_code if record is not None else None
    return code if code is not None else 0 if status.state == COMPLETED else 1


def _open_record(config: Config, job: JobSpec) -> RunRecord:
    write_folder(config, job)
    record = load_record(job.run_dir) or RunRecord(job.run_id, job.name, job.engine, created=now())
    record.engine, record.state, record.reason, record.job_id = job.engine, QUEUED, "", ""
    record.launched_at, record.ended, record.exit_code = len(record.attempts), None, None
    record.bad_nodes = []
    record.save(job.run_dir)
    return record


def _start_in_background(job: JobSpec) -> None:
    log = job.run_dir / "logs" / "launcher.log"
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_rb.launch.batch", str(job.run_dir)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    end = time.monotonic() + 20
    while time.monotonic() < end and process.poll() is None:
        record = load_record(job.run_dir)
        if record is not None and record.job_id:
            return
        time.sleep(0.05)
    raise ValueError(f"the run did not start; see {log}")


def _check_idle(run_dir: Path) -> None:
    record = load_record(run_dir)
    if record is None or record.state in ENDED or not record.job_id:
        return
    state, _ = present_state(record)
    if state not in ENDED:
        raise ValueError(
            f"run {record.run_id} in {run_dir} is {state} already ({record.engine} {record.job_id}); stop it with "
            f"action=stop, or choose another run_dir"
        )


def _check_hosts(job: JobSpec) -> None:
    names = [host.name for host in job.ssh.hosts][: job.nodes + job.spare_nodes]
    silent = unreachable(job.ssh, names)
    if silent:
        host, words = next(iter(silent.items()))
        more = f" (and {len(silent) - 1} more)" if len(silent) > 1 else ""
        raise ValueError(
            f"host {host}{more} does not answer: {words or 'no message'}; take it out of the "
            f"host file, or try `ssh {' '.join(job.ssh.options)} {host} true`"
        )
    _check_remote_port(job, names[0])


def _check_remote_port(job: JobSpec, host: str) -> None:
    if not job.master_port:
        return
    probe = shlex.join([job.python, "-c", f"import socket; socket.socket().bind(('', {job.master_port}))"])
    if on_all(job.ssh, [host], probe)[host].returncode:
        raise ValueError(
            f"port {job.master_port} of {host} is in use or {job.python} does not start there; choose another "
            f"cluster.master_port, or 0 for a free one"
        )


def _check_unfinished(record: RunRecord) -> None:
    if record.state == COMPLETED:
        raise ValueError(f"run {record.run_id} has finished; there is nothing to queue again")


def _has_ended(run_dir: Path) -> bool:
    record = load_record(run_dir)
    return record is None or present_state(record)[0] in ENDED


def _interesting_rank(record: RunRecord | None) -> int:
    failed = [note.rank for note in record.attempts if note.rank is not None] if record is not None else []
    return failed[-1] if failed and record is not None and record.state not in (RUNNING, COMPLETED) else 0


def _stop_job(record: RunRecord, run_dir: Path, state: str, at_once: bool) -> None:
    if at_once or state == QUEUED:
        slurm.cancel(record.job_id)
        _wait(lambda: _slurm_ended(record.job_id))
        last = load_record(run_dir) or record
        status = run_status(run_dir)
        last.state, last.ended = STOPPED, now()
        last.reason = f"cancelled by the user; {kept(status.last_checkpoint, status.step)}"
        last.save(run_dir)
        return
    slurm.ask_to_save(record.job_id)
    _wait(lambda: _has_ended(run_dir))


def _slurm_ended(job_id: str) -> bool:
    job = slurm.job_state(job_id)
    # A node that is gone keeps a job in COMPLETING until Slurm notices; what could be ended has ended by then.
    return job is None or job.state in ENDED or job.word == "COMPLETING"


def _stop_process(record: RunRecord, at_once: bool) -> None:
    pid = int(record.job_id.rpartition(":")[2])
    os.kill(pid, signal.SIGINT if at_once else signal.SIGTERM)
    if at_once:
        time.sleep(0.2)
        os.kill(pid, signal.SIGINT)  # the second one kills at once
    _wait(lambda: not process_lives(record.job_id))


def _wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + STOP_SECONDS
    while not condition():
        if time.monotonic() > end:
            raise ValueError(f"the run has not ended within {STOP_SECONDS} s; end it with action=stop --now")
        time.sleep(0.2)
