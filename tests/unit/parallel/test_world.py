"""Threads of a process: the setting, the environment, the share of the cores, in this order."""

import os

import pytest

from megatron_rb.parallel.world import cpu_threads_of_rank


@pytest.mark.parametrize(
    ("configured", "omp", "ranks", "threads"),
    [(3, "1", "1", 3), (0, "5", "1", 5), (0, "4,2", "1", 4), (0, "", "1", 8), (0, "none", "2", 4), (0, "0", "64", 1)],
)
def test_threads_of_a_process(configured, omp, ranks, threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", omp)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    assert cpu_threads_of_rank(configured) == threads
