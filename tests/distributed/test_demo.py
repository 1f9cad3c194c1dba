"""The demo runs from data to a reloaded export, and `rb parity` tells equal from different."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_rb.checkpoint.hf.oracle import run_transformers
from megatron_rb.parity.samples import draw_samples
from megatron_rb.shapes.shape import load_shape
from tests.distributed.forked import REPOSITORY, run_forked
from tests.distributed.launched import LAUNCHED
from tests.parity.tiny_models import write_model

SUMMARY = {
    "layout": None,
    "world_size": None,
    "seconds": None,
    "train": {"first_loss", "final_loss"},
    "eval": {
        "untrained_loss",
        "constant_loss",
        "trained_loss",
        "untrained_hop_loss",
        "trained_hop_loss",
        "unreadable",
        *(
            f"{who}{what}"
            for who in ("", "constant_")
            for what in ("pointing_hit_rate", "depth_error_cm", "voc_plus", "voc_minus")
        ),
    },
    "export": {"max_abs_logit_diff"},
}


def rb(*words: object, folder: Path, timeout: float = 300, module: str = LAUNCHED) -> subprocess.CompletedProcess:
    return run_forked(module, *words, folder=folder, timeout=timeout, COLUMNS="150")


@pytest.mark.timeout(800)
def test_short_demo_goes_all_the_way(tmp_path):
    """Every rank is a new interpreter, as with users."""
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    short = ["schedule.train_steps=3", "schedule.eval_every=0", "checkpoint.save_every=0"]
    words = ["demo", *short, "--questions", 20, "--episodes", 3]
    done = rb(*words, folder=tmp_path, timeout=780, module="megatron_rb.cli")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "runs/demo/summary.json").read_text())
    for key, fields in SUMMARY.items():
        assert key in summary and (fields is None or fields <= summary[key].keys())
    assert summary["world_size"] == 4 and summary["layout"] == "P v | v M E t*3 L"
    assert summary["export"]["max_abs_logit_diff"] < 1e-4
    assert summary["eval"]["trained_loss"] < summary["eval"]["untrained_loss"]
    assert summary["eval"]["answers"] > 40 + 3 * 2 and 0 < summary["eval"]["constant_depth_error_cm"] < 50
    assert (tmp_path / "runs/demo/curves.png").is_file() and (tmp_path / "runs/demo/eval/report.html").is_file()


def test_parity_command_passes_dumps_and_fails(tmp_path):
    right, wrong = (write_model(tmp_path / name, "qwen3_vl", seed) for name, seed in (("right", 0), ("wrong", 0)))
    shape = load_shape(right)
    layout = f"P v*2 | v*{shape.vision.num_layers - 2} M E t*{shape.text.num_layers} L"
    done = rb(
        "parity",
        "--hf",
        right,
        "--layout",
        layout,
        "--tp",
        2,
        "--sequence-parallel",
        "--grads",
        "--json",
        tmp_path / "rows.json",
        "--dump",
        tmp_path / "logits.safetensors",
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal within" in done.stdout
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert all(row["passed"] is not False for row in rows)
    assert sum(row["name"].startswith("gradient ") for row in rows) > 100
    expected = run_transformers(right, shape, draw_samples(shape, seed=7), grads=False).logits
    torch.testing.assert_close(load_file(tmp_path / "logits.safetensors")["logits"], expected, atol=1e-4, rtol=0)

    spoil_one_weight(wrong, "model.language_model.layers.1.mlp.up_proj.weight")
    done = rb("parity", "--hf", right, "--weights", wrong, folder=tmp_path)
    assert done.returncode == 1
    assert "first block that parts: block language.layers.1" in done.stdout


def spoil_one_weight(folder: Path, name: str) -> None:
    from safetensors.torch import save_file

    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name] + 0.05
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
