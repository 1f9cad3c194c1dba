"""A job that its user has ended is not queued again by the machines that outlive its batch script."""

import subprocess

import pytest

from megatron_rb.launch.agent import _still_runs


@pytest.mark.parametrize(
    ("answer", "runs"),
    [("echo RUNNING", True), ("echo COMPLETING", False), ("echo CANCELLED", False), ("exit 1", True)],
)
def test_only_a_job_that_slurm_still_runs_is_queued_again(answer, runs, tmp_path, monkeypatch):
    squeue = tmp_path / "squeue"
    squeue.write_text(f"#!/bin/sh\n{answer}\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert _still_runs("17") is runs


def test_a_controller_that_does_not_answer_says_nothing(monkeypatch):
    def waits(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", waits)
    assert _still_runs("17")
