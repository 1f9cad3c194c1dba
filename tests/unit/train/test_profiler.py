"""Traces of named steps and ranks, and snapshots of device memory."""

import gzip
import json

import pytest
import torch

from megatron_rb.config.schema import ProfileConfig
from megatron_rb.platform import get_platform
from megatron_rb.platform.cpu import CpuPlatform
from megatron_rb.train.profiler import StepProfiler


class Remembering(CpuPlatform):
    """A platform that keeps a history of its memory."""

    recorded = False

    def _offers(self, capability: str) -> bool:
        return capability == "memory_history"

    def record_memory_history(self, recorded: bool) -> None:
        self.recorded = recorded

    def write_memory_snapshot(self, path) -> None:
        assert self.recorded
        path.write_bytes(b"history")


def steps(profiler: StepProfiler, count: int) -> None:
    for step in range(1, count + 1):
        with profiler.of_step(step), profiler.named_range("optimizer"):
            torch.ones(8, 8) @ torch.ones(8, 8)


def files(folder) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def test_named_steps_are_traced_on_named_ranks_and_no_other(tmp_path):
    for rank in range(3):
        steps(StepProfiler(ProfileConfig(steps=[2, 4], ranks=[0, 2]), tmp_path, rank, get_platform("cpu")), 5)
    assert files(tmp_path) == {f"step{step}.rank{rank}.json.gz" for step in (2, 4) for rank in (0, 2)}


def test_a_trace_holds_the_operators_of_its_step_under_its_ranges(tmp_path):
    steps(StepProfiler(ProfileConfig(steps=[2]), tmp_path, 0, get_platform("cpu")), 3)
    events = json.loads(gzip.decompress((tmp_path / "step2.rank0.json.gz").read_bytes()))["traceEvents"]
    names = [event.get("name") for event in events]
    assert names.count("step 2") == 1 and "optimizer" in names and "aten::matmul" in names
    assert "step 1" not in names and "step 3" not in names


def test_without_a_named_step_nothing_is_written(tmp_path):
    steps(StepProfiler(ProfileConfig(), tmp_path / "profile", 0, get_platform("cpu")), 2)
    assert files(tmp_path) == set()


def test_memory_is_kept_on_request_and_written_after_the_last_step(tmp_path):
    steps(StepProfiler(ProfileConfig(steps=[1, 2], memory=True), tmp_path, 0, Remembering()), 3)
    assert "memory.step2.rank0.pickle" in files(tmp_path)
    assert "memory.step1.rank0.pickle" not in files(tmp_path)


@pytest.mark.parametrize("rank", [0, 5])
def test_every_rank_that_runs_out_of_memory_writes_its_history(tmp_path, rank):
    profiler = StepProfiler(ProfileConfig(memory=True), tmp_path, rank, Remembering())
    with pytest.raises(torch.OutOfMemoryError), profiler.of_step(7):
        raise torch.OutOfMemoryError("too much")
    assert files(tmp_path) == {f"out-of-memory.step7.rank{rank}.pickle"}


def test_a_platform_without_a_history_says_so_before_the_run():
    with pytest.raises(ValueError, match="metrics.profile.memory is true and platform cpu keeps no history"):
        StepProfiler(ProfileConfig(memory=True), None, 0, get_platform("cpu"))


def test_a_folder_that_cannot_be_written_ends_no_run(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    steps(StepProfiler(ProfileConfig(steps=[1]), tmp_path / "file", 0, get_platform("cpu")), 1)
    assert "was not written" in caplog.text
