"""The ranks of a machine as their progress files show them."""

import json
import os
import time
from pathlib import Path

import pytest

from megatron_rb.launch.beats import Beats, Hang, remove_earlier
from megatron_rb.launch.limits import Limits


@pytest.fixture
def clock(monkeypatch):
    """Seconds that `time.monotonic` says; a test moves them on."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def report(folder: Path, rank: int, phase: str, step: int, at: float) -> None:
    beat = {"pid": os.getpid(), "phase": phase, "step": step, "time": at, "sections": {}}
    (folder / f"rank_{rank}").write_text(json.dumps(beat))


def test_the_rank_that_is_silent_longest_hangs(tmp_path: Path, clock):
    beats = Beats(tmp_path, [4, 5], Limits(unknown=60.0))
    report(tmp_path, 4, "init", 0, 1.0)
    beats.look()
    clock[0] += 30
    report(tmp_path, 5, "init", 0, 31.0)
    beats.look()
    clock[0] += 59
    assert beats.hang() == Hang(rank=4, phase="init", step=0, seconds=89.0, limit=60.0)


def test_a_rank_that_never_reported_hangs_in_its_start(tmp_path: Path, clock):
    beats = Beats(tmp_path, [0], Limits(unknown=60.0))
    clock[0] += 61
    assert beats.hang() == Hang(0, "start", 0, 61.0, 60.0)


def test_a_rank_that_has_ended_does_not_hang(tmp_path: Path, clock):
    beats = Beats(tmp_path, [0, 1], Limits(unknown=60.0))
    (tmp_path / "exit_1").write_text("137")
    assert beats.look() == [1] and beats.exits == {1: 137}
    assert beats.look() == []
    clock[0] += 61
    hang = beats.hang()
    assert hang is not None and hang.rank == 0


def test_a_file_that_is_being_written_is_read_the_next_time(tmp_path: Path, clock):
    beats = Beats(tmp_path, [0], Limits(unknown=60.0))
    (tmp_path / "rank_0").write_text('{"pid": 1, "pha')
    assert beats.look() == [] and beats.progress[0].beat is None
    report(tmp_path, 0, "step", 3, 2.0)
    beats.look()
    assert beats.progress[0].beat is not None and beats.progress[0].beat.step == 3


def test_folders_of_earlier_attempts_of_the_run_go_and_those_of_others_stay(tmp_path: Path):
    names = ("rb-run-1-a", "rb-run-2-a", "rb-run-1-b", "rb-other-1-a")
    for name in names:
        (tmp_path / name).mkdir()
    assert remove_earlier("run", tmp_path / "rb-run-2-a", "run/2") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rb-other-1-a", "rb-run-1-b", "rb-run-2-a"]
