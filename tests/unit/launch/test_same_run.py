"""A run folder is continued by the run that it belongs to, and by no other."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rb.config.compose import CONFIG_FILE, save_config
from megatron_rb.config.schema import Config, DataConfig, ModelConfig
from megatron_rb.launch.folder import check_same_run
from megatron_rb.launch.job import JobSpec


def settings(hf: Path | str, *train: Path | str) -> Config:
    return Config(model=ModelConfig(str(hf)), data=DataConfig(train=[str(file) for file in train]))


@pytest.fixture
def job(tmp_path: Path) -> JobSpec:
    """A run with a checkpoint, started in a folder from relative paths."""
    run = tmp_path / "run"
    (run / "checkpoints" / "step_00000004").mkdir(parents=True)
    job = JobSpec("m", (), 1, run, work_dir=tmp_path, checkpoint_dir=run / "checkpoints")
    save_config(settings("hf", "a.jsonl"), run / CONFIG_FILE)
    job.save()
    return job


def test_the_same_files_written_otherwise_are_the_same_run(job, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    check_same_run(settings(tmp_path / "hf", tmp_path / "a.jsonl"), job)
    check_same_run(settings("./hf/", "run/../a.jsonl"), job)
    check_same_run(settings("link/hf", "link/a.jsonl"), job)


def test_the_same_words_in_another_folder_are_other_files(job, tmp_path):
    elsewhere = replace(job, work_dir=tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"model.hf_path is .*/hf there and .*/elsewhere/hf here; data.train is \["):
        check_same_run(settings("hf", "a.jsonl"), elsewhere)


@pytest.mark.parametrize(
    ("hf", "train", "said"), [("other", "a.jsonl", "model.hf_path is "), ("hf", "b.jsonl", "data.train is ")]
)
def test_other_files_are_another_config(job, hf: str, train: str, said: str):
    with pytest.raises(ValueError, match=f"holds the run of another config: {said}"):
        check_same_run(settings(hf, train), job)


@pytest.mark.parametrize("steps", [1, 3])
def test_fewer_steps_than_the_run_has_made_are_refused(job, steps: int):
    config = settings("hf", "a.jsonl")
    config.schedule.train_steps = steps
    with pytest.raises(
        ValueError, match=f"holds a run of 4 steps and schedule.train_steps is {steps}; ask for 4 or more"
    ):
        check_same_run(config, job)


@pytest.mark.parametrize("steps", [0, 4, 5])
def test_as_many_steps_or_more_continue_the_run(job, steps: int):
    config = settings("hf", "a.jsonl")
    config.schedule.train_steps = steps
    check_same_run(config, job)
