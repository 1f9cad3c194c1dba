"""A run on this machine: attempts of real processes (small scripts instead of trainers) and what their record says."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rb.launch.failure import FailureKind
from megatron_rb.launch.job import JobSpec, Patience
from megatron_rb.launch.loop import Loop
from megatron_rb.launch.one_machine import LocalEngine
from megatron_rb.launch.record import RunRecord

REPOSITORY = Path(__file__).parents[3]
PRELUDE = """
import json, os, pathlib, sys, time
rank, attempt = int(os.environ["RANK"]), int(os.environ["RB_ATTEMPT"].rpartition("/")[2].partition("-")[0])
def report(phase, step):
    beat = {"pid": os.getpid(), "phase": phase, "step": step, "time": time.time(), "sections": {}}
    file = pathlib.Path(os.environ["RB_BEATS"], f"rank_{rank}")
    file.with_suffix(".partial").write_text(json.dumps(beat))
    file.with_suffix(".partial").rename(file)
"""


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[int, RunRecord]]:
    """Runs a script in two ranks; the exit code and the record."""

    def go(script: str, max_retries: int = 0, hang: float = 600.0) -> tuple[int, RunRecord]:
        (tmp_path / "dummy_rank.py").write_text(PRELUDE + script)
        path = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
        patience = Patience(grace=5.0, hang=hang, least=0.1)
        job = JobSpec(
            "dummy_rank",
            (),
            2,
            tmp_path,
            env={"PYTHONPATH": path},
            run_id=f"one-machine-{os.getpid()}",
            max_retries=max_retries,
            patience=patience,
        )
        signals: list[int] = []
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
