"""`rb bench train` from command to report: one process beside transformers, and two pipeline stages."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from megatron_rb.bench.train.compare import compare
from megatron_rb.bench.train.result import SECTIONS, load_result
from megatron_rb.shapes.shape import load_shape
from tests.distributed.forked import run_forked
from tests.distributed.launched import LAUNCHED
from tests.parity.tiny_models import write_model
from tests.unit.bench.train.samples import MIX


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("bench") / "qwen2_5_vl", "qwen2_5_vl", seed=0)


def bench_train(model, out: Path, *words: str):
    mix = out.parent / "mix.json"
    mix.write_text(json.dumps(asdict(MIX)))
    command = ["bench", "train", "--model", model, "--mix", mix, "--out", out, "--steps", 4, "--warmup", 1, *words]
    done = run_forked(LAUNCHED, *command, folder=out.parent, timeout=280, COLUMNS="150")
    assert done.returncode == 0, done.stdout + done.stderr
    return load_result(out), done.stdout


@pytest.mark.timeout(600)
def test_one_process_and_two_stages_measure_the_same_work(model, tmp_path):
    alone, said = bench_train(model, tmp_path / "alone", "--baseline", "hf", "platform=cpu", "model.dtype=fp32")
    assert "x as fast (transformers" in said
    assert alone.baseline is not None and alone.baseline.tokens > 0
    losses = alone.baseline.losses.values()
    assert max(losses) - min(losses) < 1e-4

    layers = load_shape(model).vision.num_layers - 2, load_shape(model).text.num_layers
    layout = f"parallel.layout=P v*2 | v*{layers[0]} M E t*{layers[1]} L"
    stages, _ = bench_train(model, tmp_path / "stages", "platform=cpu", "parallel.pp_size=2", layout)

    # The same seed packs the same samples whatever the layout.
    works = [[(s.samples, s.tokens, s.labels, s.patches, s.flops) for s in found.steps] for found in (alone, stages)]
    assert works[0] == works[1] and len(works[0]) == 4
    assert stages.loads == alone.loads
    assert (alone.devices, stages.devices) == (1, 2)
    for found in (alone, stages):
        for rank in found.ranks:
            assert set(rank.sections) == set(SECTIONS)
            assert rank.sections["backward"] > 0 and rank.peak_memory_bytes
            assert -1e-6 <= rank.bubble < 1
        for stage in found.timeline:
            assert [span.kind for span in stage.spans].count("forward") == MIX.micro_batches
            assert [span.kind for span in stage.spans].count("backward") == MIX.micro_batches
    # The first stage has vision blocks alone; on one stage nobody waits, on two the pipeline fills and drains.
    assert stages.ranks[0].sections["language forward"] == 0 < stages.ranks[0].sections["vision forward"]
    assert max(rank.bubble for rank in stages.ranks) > alone.ranks[0].bubble
    notes = compare(alone, alone, limit=0.0).notes
    assert notes == ()
    for out in ("alone", "stages"):
        page = (tmp_path / out / "report.md").read_text()
        assert "CPU figures. They say nothing about a GPU." in page and str(tmp_path) not in page
        assert (tmp_path / out / "report.png").stat().st_size > 10_000
        assert str(tmp_path) not in (tmp_path / out / "result.json").read_text()
        assert not (tmp_path / out / "model").exists()
