"""A run that is killed or stopped continues as if nothing had happened, under the same layout and under another."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from megatron_rb.builders.build import SampleMix, write_split
from megatron_rb.checkpoint.hf.tiny import TinySize, conversation_texts, write_tiny_model
from megatron_rb.config.schema import DataConfig
from megatron_rb.data.build import build_dataset, build_encoder
from megatron_rb.data.ledger import Ledger
from megatron_rb.shapes.shape import load_shape
from tests.distributed.launched import Launched

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 8
SPLIT_VISION = ["parallel.tp_size=1", "parallel.pp_size=2", "parallel.layout=P v | v M E t*3 L"]
TENSOR_PARALLEL = ["parallel.tp_size=2", "parallel.pp_size=1", "parallel.sequence_parallel=true", "parallel.layout=''"]
CONTEXT_PARALLEL = ["parallel.tp_size=1", "parallel.pp_size=1", "parallel.cp_size=2", "parallel.layout=''"]
DATA_PARALLEL = ["parallel.tp_size=1", "parallel.pp_size=1", "world_size=2", "parallel.layout=''"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Model folder and data of the runs."""
    folder = tmp_path_factory.mktemp("inputs")
    mix = SampleMix(tasks=("pointing", "uvd"), views=("side",), windows=0)
    write_split(REPOSITORY / "examples/robosim/heldout", folder, "heldout", mix, 0)
    write_tiny_model(
        conversation_texts(folder / "heldout.jsonl"), folder / "hf", family="qwen3_vl", size=TinySize(), seed=0
    )
    return folder


def command(inputs: Path, run_dir: Path, layout: list[str]) -> list[str]:
    settings = [
        f"model.hf_path={inputs / 'hf'}",
        "model.dtype=fp32",
        f"data.train=[{inputs / 'heldout.jsonl'}]",
        "data.seq_length=512",
        "data.max_patches=1024",
        "data.global_batch_size=6",
        f"run_dir={run_dir}",
        f"schedule.train_steps={STEPS}",
        "checkpoint.save_every=2",
        "checkpoint.init=",
        "optimizer.lr=1e-3",
        "metrics.tensorboard=false",
        "metrics.plots=false",
        "platform.name=cpu",
        "cluster.grace_seconds=20",
    ]
    return ["launch", *settings, *layout]


def start(inputs: Path, run_dir: Path, layout: list[str]) -> Launched:
    return Launched(command(inputs, run_dir, layout), REPOSITORY)


def finish(inputs: Path, run_dir: Path, layout: list[str]) -> dict[int, float]:
    process = start(inputs, run_dir, layout)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return losses(run_dir)


def losses(run_dir: Path) -> dict[int, float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {record["step"]: record["loss"] for record in records if record["kind"] == "step"}


def interrupt(inputs: Path, run_dir: Path, signum: int, after_step: int, to_rank: int | None) -> Launched:
    """Send a signal to one rank, or to the launcher, once a step has been logged."""
    process = start(inputs, run_dir, SPLIT_VISION)
    deadline = time.monotonic() + 240
    while not (run_dir / "metrics.jsonl").is_file() or max(losses(run_dir), default=0) < after_step:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=10)[0]
        time.sleep(0.02)
    target = process.pid if to_rank is None else rank_pid(process.pid, to_rank)
    os.kill(target, signum)
    return process


def rank_pid(launcher: int, rank: int) -> int:
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if Path(f"/proc/{child}/comm").read_text() == f"rank {rank}\n":
            return int(child)
    raise AssertionError(f"the launcher has no rank {rank}")


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    return finish(inputs, tmp_path_factory.mktemp("undisturbed"), SPLIT_VISION)


def test_killed_rank_and_resume_give_the_same_losses_bit_for_bit(inputs, undisturbed, tmp_path):
    step = random.choice([3, 4, 5, 6])
    process = interrupt(inputs, tmp_path, signal.SIGKILL, after_step=step, to_rank=1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGKILL
    assert "rank 1 was killed by SIGKILL" in output
    elsewhere = shutil.copytree(tmp_path, tmp_path.with_name(tmp_path.name + "-elsewhere"))
    continued = finish(inputs, elsewhere, [*CONTEXT_PARALLEL, "data.padding=buckets"])
    assert continued == pytest.approx(undisturbed, rel=1e-4), f"killed after step {step}"
    assert finish(inputs, tmp_path, SPLIT_VISION) == undisturbed, f"killed after step {step}"
    assert sorted(undisturbed) == list(range(1, STEPS + 1))


def test_stop_signal_saves_and_other_layouts_continue(inputs, undisturbed, tmp_path):
    process = interrupt(inputs, tmp_path, signal.SIGTERM, after_step=3, to_rank=None)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    stopped = max(losses(tmp_path))
    assert 3 <= stopped < STEPS
    assert (tmp_path / "checkpoints" / f"step_{stopped:08d}").is_dir()
    steps_to_go = f"schedule.train_steps={STEPS}"
    continued = finish(inputs, tmp_path, [*TENSOR_PARALLEL, steps_to_go])
    assert continued == pytest.approx(undisturbed, rel=1e-4)


def test_data_parallel_run_equals_the_pipeline_run(inputs, undisturbed, tmp_path):
    assert finish(inputs, tmp_path, DATA_PARALLEL) == pytest.approx(undisturbed, rel=1e-4)


def test_edited_data_stop_the_resume_unless_they_are_allowed(inputs, tmp_path):
    data = tmp_path / "edited.jsonl"
    rows = [json.loads(line) for line in (inputs / "heldout.jsonl").read_text().splitlines()[:12]]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    alone = ["parallel.pp_size=1", "parallel.layout=''", f"data.train=[{data}]", f"data.media_root={inputs}"]
    finish(inputs, tmp_path / "run", [*alone, "schedule.train_steps=2"])
    data.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    process = start(inputs, tmp_path / "run", [*alone, "schedule.train_steps=3"])
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "the data are not those of the checkpoint: changed is" in output
    continued = finish(inputs, tmp_path / "run", [*alone, "schedule.train_steps=3", "data.allow_changed=true"])
    assert sorted(continued) == [1, 2, 3]


def test_unreadable_image_is_noted_and_takes_no_part(inputs, tmp_path):
    """The header is fine, so the index takes the row; only one of two tensor-parallel ranks opens it and finds out, and
    the other three ranks must learn it."""
    rows = [json.loads(line) for line in (inputs / "heldout.jsonl").read_text().splitlines()[:6]]
    for row in rows:
        row["image"] = [str(inputs / row["image"][0])]
    content = Path(rows[2]["image"][0]).read_bytes()
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(content[: len(content) * 2 // 3])
    rows[2]["image"] = [str(broken)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    layout = [*SPLIT_VISION, "parallel.tp_size=2"]
    settings = [*layout, f"data.train=[{data}]", "schedule.train_steps=1", "checkpoint.save_every=0"]
    finish(inputs, tmp_path / "run", settings)
    notes = [json.loads(line) for line in (tmp_path / "run/ledger.jsonl").read_text().splitlines()]
    assert [(note["kind"], note["id"]) for note in notes] == [("unreadable", rows[2]["id"])]
    step = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    whole = [row for row in rows if row["image"] != [str(broken)]]
    assert step["num_samples"] == 6
    assert step["num_labels"] == label_count(inputs, whole, tmp_path) > 0


def label_count(inputs: Path, rows: list[dict], folder: Path) -> int:
    """Answer tokens of some rows, as the data room counts them."""
    shape, settings = load_shape(inputs / "hf"), DataConfig()
    file = folder / "whole.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoder = build_encoder(settings, inputs / "hf", shape)
    dataset = build_dataset(settings, encoder, [str(file)], Ledger(folder / "whole-ledger.jsonl"))
    return sum(int((dataset.get(n, with_pixels=False).labels[1:] != -100).sum()) for n in range(len(dataset)))
