"""A run on this machine: attempts of real processes (small scripts instead of trainers) and what their record says."""

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megatron_rb.launch.batch import carry_on
from megatron_rb.launch.failure import FailureKind
from megatron_rb.launch.job import JobSpec, Patience
from megatron_rb.launch.loop import Loop
from megatron_rb.launch.one_machine import LocalEngine
from megatron_rb.launch.record import RunRecord, load_record

REPOSITORY = Path(__file__).parents[3]
PRELUDE = """
import json, os, pathlib, sys, time
rank, attempt = int(os.environ["RANK"]), int(os.environ["RB_ATTEMPT"].rpartition("/")[2].partition("-")[0])
def report(phase, step):
    beat = {"pid": os.getpid(), "phase": phase, "step": step, "time": time.time(), "sections": {}}
    file = pathlib.Path(os.environ["RB_BEATS"], f"rank_{rank}")
    file.with_suffix(".partial").write_text(json.dumps(beat))
    file.with_suffix(".partial").rename(file)
def wait():
    pathlib.Path(os.environ["RB_FENCE"]).parents[1].joinpath(f"ready_{rank}").touch()
    time.sleep(30)
"""
DEAF = "import signal\nfor s in (signal.SIGTERM, signal.SIGINT): signal.signal(s, signal.SIG_IGN)\n"


def stop_when_ready(folder: Path, signals: list[int], stop: Sequence[int]) -> None:
    """Have the launcher receive the signals once both ranks are where their script wants to be stopped."""
    while not all((folder / f"ready_{rank}").exists() for rank in range(2)):
        time.sleep(0.05)
    signals.extend(stop)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[int, RunRecord]]:
    """Runs a script in two ranks; the exit code and the record."""

    def go(
        script: str, max_retries: int = 0, hang: float = 600.0, stop: Sequence[int] = (), grace: float = 5.0
    ) -> tuple[int, RunRecord]:
        (tmp_path / "dummy_rank.py").write_text(PRELUDE + script)
        path = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
        patience = Patience(grace=grace, hang=hang, least=0.1)
        job = JobSpec(
            "dummy_rank",
            (),
            2,
            tmp_path,
            env={"PYTHONPATH": path},
            run_id=f"one-machine-{os.getpid()}",
            max_retries=max_retries,
            patience=patience,
            checkpoint_dir=tmp_path / "checkpoints",
        )
        signals: list[int] = []
        if stop:
            threading.Thread(target=stop_when_ready, args=(tmp_path, signals, stop), daemon=True).start()
        loop = Loop(job, LocalEngine(job, signals), signals, "here:1")
        return loop.run(), loop.record

    return go


def test_a_program_that_reports_nothing_has_finished_when_it_leaves(run):
    code, record = run("")
    assert (code, record.state) == (0, "COMPLETED")
    assert [(note.outcome, note.kind) for note in record.attempts] == [("finished", "")]


def test_a_rank_that_fails_is_in_the_record_with_its_step_and_phase(run):
    code, record = run("report('checkpoint', 4)\nif rank == 1: sys.exit(9)\ntime.sleep(30)")
    (note,) = record.attempts
    assert (code, record.state) == (9, "FAILED")
    assert (note.kind, note.rank, note.phase, note.exit_code) == (FailureKind.RANK, 1, "checkpoint", 9)
    assert note.cause == "rank 1 on localhost failed with exit code 9 after step 4"
    assert note.noticed_at is not None and note.started <= note.noticed_at <= note.ended


def test_a_failed_attempt_is_followed_by_another(run):
    script = (
        "report('step', attempt)\ntime.sleep(0.7)\nif attempt == 1 and rank == 0: sys.exit(1)\nreport('finished', 5)"
    )
    code, record = run(script, max_retries=2)
    assert (code, [note.outcome for note in record.attempts]) == (0, ["failed", "finished"])
    assert all(note.first_step_at is not None for note in record.attempts)


def test_wrong_input_is_not_tried_again(run):
    code, record = run("sys.exit(2)", max_retries=5)
    assert (code, record.state, len(record.attempts)) == (2, "FAILED", 1)
    assert record.attempts[0].kind is FailureKind.CONFIGURATION


@pytest.mark.timeout(60)
def test_a_rank_without_progress_is_a_hang_that_names_the_stacks(run):
    code, record = run("report('init', 0)\ntime.sleep(60)", hang=1.0)
    (note,) = record.attempts
    assert (code, note.kind, note.phase) == (124, FailureKind.HANG, "init")
    assert note.cause.endswith("stacks of all ranks are in stacks/attempt_1")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("max_retries", [0, 3])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_dies_of_a_stop_before_its_first_step_was_stopped_and_has_saved_nothing(run, signum, max_retries):
    code, record = run("report('init', 0)\nwait()", max_retries, stop=[signum])
    assert (code, record.state, record.reason) == (
        0,
        "STOPPED",
        "stopped by the user; no step was done, and nothing is saved",
    )
    assert [(note.outcome, note.kind) for note in record.attempts] == [("stopped", "")]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("max_retries", [0, 3])
def test_a_run_that_is_killed_at_once_says_which_steps_are_lost(run, tmp_path, max_retries):
    (tmp_path / "checkpoints" / "step_00000005").mkdir(parents=True)
    stop = [signal.SIGINT, signal.SIGINT]
    code, record = run(DEAF + "report('step', 7)\nwait()", max_retries, stop=stop)
    assert (code, record.state, record.reason) == (
        0,
        "STOPPED",
        "stopped by the user; steps 6 to 7 are lost, the newest checkpoint is of step 5",
    )
    assert record.attempts[-1].lost_steps == 2


@pytest.mark.timeout(60)
def test_a_run_that_does_not_leave_in_time_has_lost_its_steps(run):
    code, record = run(DEAF + "report('step', 1)\nwait()", stop=[signal.SIGTERM], grace=0.5)
    assert (code, record.state) == (0, "STOPPED")
    assert record.reason == "stopped by the user; step 1 is lost, the newest checkpoint is none"


@pytest.mark.timeout(60)
def test_a_run_that_cannot_save_when_it_is_stopped_has_failed(run):
    script = "import signal\nsignal.signal(signal.SIGTERM, lambda *_: os._exit(9))\nreport('step', 3)\nwait()"
    code, record = run(script, stop=[signal.SIGTERM])
    assert (code, record.state) == (9, "FAILED")


@pytest.mark.timeout(60)
def test_what_failed_while_a_run_was_stopped_is_told(run):
    script = "import signal\nsignal.signal(signal.SIGTERM, lambda *_: os._exit(9))\nreport('step', 3)\nwait()"
    code, record = run(script, max_retries=3, stop=[signal.SIGTERM])
    assert (code, record.state, len(record.attempts)) == (0, "STOPPED", 1)
    assert "steps 1 to 3 are lost, the newest checkpoint is none; rank " in record.reason
    assert "failed with exit code 9" in record.reason


@pytest.mark.timeout(60)
def test_a_run_that_saves_when_it_is_stopped_says_at_which_step(run, tmp_path):
    script = f"""
import signal
checkpoint = pathlib.Path({str(tmp_path)!r}, 'checkpoints', 'step_00000003')
signal.signal(signal.SIGTERM, lambda *_: (checkpoint.mkdir(parents=True, exist_ok=True), os._exit(0)))
report('step', 3)
wait()
"""
    code, record = run(script, stop=[signal.SIGTERM])
    assert (code, record.state, record.reason) == (0, "STOPPED", "stopped by the user; the run is saved at step 3")


FULL = Path("/dev/full")
"""A file on a disk without room."""


@pytest.fixture
def full(tmp_path: Path) -> Callable[[str], None]:
    """Lets a file of the run folder find no room, once."""

    def fill(name: str) -> None:
        path = tmp_path / f"{name}.partial"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(FULL)

    return fill


@pytest.mark.skipif(not FULL.exists(), reason="this system has no device that is always full")
def test_a_run_goes_on_while_there_is_no_room_for_the_states_of_its_ranks(run, full, capfd, tmp_path):
    full("launch/ranks.json")
    code, record = run("report('finished', 1)\ntime.sleep(1.2)")
    assert (code, record.state) == (0, "COMPLETED")
    said = capfd.readouterr().out
    assert f"{tmp_path}/launch/ranks.json cannot be written: No space left on device" in said


def test_a_record_takes_the_room_of_the_states_on_a_full_disk(run, monkeypatch, tmp_path):
    save, states = RunRecord.save, tmp_path / "launch" / "ranks.json"

    def save_where_there_is_room(record: RunRecord, run_dir: Path) -> None:
        if states.exists():
            raise OSError(errno.ENOSPC, "No space left on device", str(run_dir))
        save(record, run_dir)

    monkeypatch.setattr(RunRecord, "save", save_where_there_is_room)
    code, record = run("time.sleep(1.2)")
    assert (code, load_record(tmp_path).state) == (0, "COMPLETED")


@pytest.mark.skipif(not FULL.exists(), reason="this system has no device that is always full")
def test_a_run_whose_plan_finds_no_room_has_failed_with_the_cause(tmp_path, full):
    job = JobSpec("dummy_rank", (), 1, tmp_path, run_id="no-room")
    full("launch/attempt_1.json")
    assert carry_on(job) == 74
    record = load_record(tmp_path)
    assert (record.state, record.exit_code) == ("FAILED", 74)
    assert record.reason.startswith(f"{tmp_path}/launch/attempt_1.json cannot be written: No space left on device")


@pytest.mark.timeout(60)
@pytest.mark.skipif(not FULL.exists(), reason="this system has no device that is always full")
def test_a_rank_whose_log_finds_no_room_is_not_held_up(run, tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank_0.log").symlink_to(FULL)
    code, record = run("if rank == 0: print('x' * 1_000_000)")
    assert (code, record.state) == (0, "COMPLETED")
