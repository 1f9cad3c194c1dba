"""A task that srun says has failed is a failure at once, with the right machine and cause."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rb.launch.job import JobSpec
from megatron_rb.launch.plan import AttemptPlan
from megatron_rb.launch.ranks import RankState
from megatron_rb.launch.step_words import EndedTasks, unreported_end

JOB = JobSpec("m", (), 2, Path("/r"), engine="slurm", launcher="srun", nodes=2)
PLAN = AttemptPlan(1, "r/1", ("a", "b"), "a", 1)


def found(lines: list[str], heard: set[str], job: JobSpec = JOB, after: float = 1.0, ended: tuple[int, ...] = ()):
    """The failure that is seen so many seconds after srun's lines; `ended` are ranks that were reported."""
    tasks = EndedTasks()
    for line in lines:
        tasks.read(line, 0.0)
    ranks = {rank: RankState("step", 3, code=1 if rank in ended else None) for rank in range(4)}
    return unreported_end(job, PLAN, ranks, heard, tasks.settled(after), "cd: /w: No such file or directory", after)


@pytest.mark.parametrize(
    ("line", "numbers"),
    [
        ("srun: error: node2: task 1: Exited with exit code 2", [1]),
        ("srun: error: node[1-2]: tasks 0,2-4: Exited with exit code 127", [0, 2, 3, 4]),
        ("srun: error: node2: task 7: Out Of Memory", [7]),
        ("srun: Job step aborted: Waiting up to 32 seconds for job step to finish.", []),
        ("error: node2: task 1: of somebody else", []),
    ],
)
def test_the_tasks_of_a_line_are_found(line: str, numbers: list[int]):
    tasks = EndedTasks()
    tasks.read(line, 0.0)
    assert list(tasks.tasks) == numbers


def test_a_machine_whose_first_task_fails_before_its_supervisor_speaks_is_named_with_the_cause():
    failure = found(["srun: error: b: tasks 2-3: Exited with exit code 2"], heard={"a"})
    assert (failure.kind, failure.node) == ("node", "b")
    assert failure.text == "b could not start its processes: cd: /w: No such file or directory"


def test_what_is_wrong_everywhere_is_no_machines_fault():
    failure = found(["srun: error: a: tasks 0-1: Exited with exit code 2", "srun: error: b: tasks 2-3: Killed"], set())
    assert (failure.kind, failure.node) == ("start", "")


def test_a_rank_that_fails_before_a_slow_supervisor_speaks_does_not_condemn_its_machine():
    assert found(["srun: error: b: task 3: Exited with exit code 1"], heard={"a"}) is None


def test_a_reported_rank_is_no_news():
    assert found(["srun: error: b: task 3: Exited with exit code 1"], {"a", "b"}, after=60.0, ended=(3,)) is None


def test_a_rank_that_nobody_reports_counts_after_the_silence_of_a_machine():
    line = "srun: error: b: task 3: Out Of Memory"
    assert found([line], {"a", "b"}, after=JOB.patience.silence) is None
    failure = found([line], {"a", "b"}, after=JOB.patience.silence + 0.1)
    assert (failure.kind, failure.rank, failure.node) == ("rank", 3, "b")
    assert "srun: Out Of Memory" in failure.text


def test_a_task_of_torchrun_stands_for_all_ranks_of_its_machine():
    torchrun = replace(JOB, launcher="torchrun")
    line = "srun: error: b: task 1: Exited with exit code 2"
    assert found([line], {"a"}, torchrun).node == "b"
    assert found([line], {"a", "b"}, torchrun, after=60.0).rank == 2
