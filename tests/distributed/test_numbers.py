"""Runs whose numbers are not finite, or that can learn nothing, end with a sentence and without harm."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_rb.builders.build import SampleMix, write_split
from megatron_rb.checkpoint.hf.tiny import TinySize, conversation_texts, write_tiny_model
from megatron_rb.launch.status import run_status
from tests.distributed.forked import REPOSITORY, run_forked


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Model folder, data, and rows whose picture is cut off."""
    folder = tmp_path_factory.mktemp("inputs")
    mix = SampleMix(tasks=("pointing",), views=("side",), windows=0)
    write_split(REPOSITORY / "examples/robosim/heldout", folder, "heldout", mix, 0)
    write_tiny_model(
        conversation_texts(folder / "heldout.jsonl"), folder / "hf", family="qwen3_vl", size=TinySize(), seed=0
    )
    picture = (REPOSITORY / "examples/robosim/heldout").rglob("*.jpg").__next__().read_bytes()
    (folder / "cut.jpg").write_bytes(picture[: len(picture) // 2])
    turns = [{"from": "human", "value": "<image>Where?"}, {"from": "gpt", "value": "here"}]
    row = json.dumps({"image": "cut.jpg", "conversations": turns})
    (folder / "unreadable.jsonl").write_text(f"{row}\n" * 3)
    return folder


def rb(command: str, inputs: Path, run_dir: Path, *settings: str) -> tuple[int, str]:
    words = [
        f"model.hf_path={inputs / 'hf'}",
        "model.dtype=fp32",
        f"data.train=[{inputs / 'heldout.jsonl'}]",
        "data.seq_length=512",
        "data.max_patches=1024",
        "data.global_batch_size=3",
        f"run_dir={run_dir}",
        "checkpoint.save_every=1",
        "checkpoint.init=",
        "optimizer.lr=1e-3",
        "schedule.decay=constant",
        "schedule.warmup_ratio=0",
        "metrics.plots=false",
        "platform.name=cpu",
    ]
    line = ["megatron_rb.cli", command, *words, *settings]
    done = run_forked(*line, folder=REPOSITORY, timeout=150, merged=True)
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def diverged(inputs, tmp_path_factory):
    """A run that goes well for two steps and is then continued with a learning rate that destroys its weights."""
    run_dir = tmp_path_factory.mktemp("diverged") / "run"
    assert rb("train", inputs, run_dir, "schedule.train_steps=2")[0] == 0
    code, output = rb(
        "launch",
        inputs,
        run_dir,
        "schedule.train_steps=20",
        "optimizer.lr=1e30",
        "optimizer.clip_grad=0",
        "checkpoint.keep_last=1",
        "cluster.max_retries=3",
        "data.global_batch_size=3",
    )
    return run_dir, code, output


def test_a_run_whose_losses_are_not_finite_stops_and_says_where(diverged):
    _, code, output = diverged
    assert code == 65
    assert "step 6: loss nan, gradient norm nan, loss not finite on rank 0, micro-batch 0 with" in output
    assert "3 updates in a row were skipped (optimizer.max_bad_steps 3); lower optimizer.lr" in output
    assert "the same command then continues from step 2" in output


def test_it_is_not_tried_again(diverged):
    run_dir, _, output = diverged
    assert len(json.loads((run_dir / "run.json").read_text())["attempts"]) == 1
    assert "FAILED" in output


def test_its_last_good_checkpoint_stays_the_newest(diverged):
    names = {path.name for path in (diverged[0] / "checkpoints").iterdir()}
    assert names == {"hf", "step_00000002", "step_00000003.not-finite"}


def test_skipped_updates_are_counted_in_metrics_status_and_tensorboard(diverged):
    run_dir = diverged[0]
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_updates"] for line in steps if line["kind"] == "step"] == [0, 0, 0, 1, 2, 3]
    assert "3 updates skipped" in run_status(run_dir).line()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("train/skipped_updates")][-1] == 3


def test_a_healthy_learning_rate_continues_it(diverged, inputs, tmp_path):
    shutil.copytree(diverged[0], tmp_path / "run")
    code, output = rb("train", inputs, tmp_path / "run", "schedule.train_steps=4")
    assert code == 0, output
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    counts = [(line["step"], line["skipped_updates"]) for line in steps if line["kind"] == "step"]
    assert counts[-2:] == [(3, 0), (4, 0)]


def test_a_run_that_ends_while_updates_are_skipped_has_failed(inputs, tmp_path):
    code, output = rb("train", inputs, tmp_path, "schedule.train_steps=2", "optimizer.lr=1e30", "optimizer.clip_grad=0")
    assert code == 65
    assert "step 2: loss nan" in output and "use another run_dir" in output


def test_a_run_in_which_no_sample_can_be_read_stops(inputs, tmp_path):
    code, output = rb(
        "train", inputs, tmp_path, f"data.train=[{inputs / 'unreadable.jsonl'}]", "schedule.train_steps=50"
    )
    assert code == 2
    assert "rb: step 3 has nothing to learn: none of its 3 samples could be read; 3 updates in a row were" in output
    assert not list((tmp_path / "checkpoints").glob("step_*"))


def test_an_evaluation_in_which_no_sample_can_be_read_is_absent(inputs, tmp_path):
    code, output = rb(
        "train", inputs, tmp_path, f"data.evaluation=[{inputs / 'unreadable.jsonl'}]", "schedule.train_steps=1"
    )
    assert code == 0, output
    assert "no loss: none of the 3 held-out samples could be read" in output
    assert '"eval"' not in (tmp_path / "metrics.jsonl").read_text()


def test_weights_that_are_not_finite_are_not_trained_on(inputs, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(inputs / "hf", tmp_path / "hf")
    file = next((tmp_path / "hf").glob("*.safetensors"))
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[3] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    code, output = rb("train", inputs, tmp_path / "run", f"model.hf_path={tmp_path / 'hf'}", "schedule.train_steps=1")
    assert code == 2
    assert "hold NaN or infinity, the first is" in output
