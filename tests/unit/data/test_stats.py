"""`rb data stats`: sizes of samples from headers alone."""

import json

import numpy as np

from megatron_rb import cli
from megatron_rb.config.schema import DataConfig
from megatron_rb.data.build import build_dataset
from megatron_rb.data.ledger import Ledger
from megatron_rb.data.stats import sample_histogram
from megatron_rb.planner.histogram import load_histogram


def test_histogram_of_a_file(encoder, shape, draw_image, tmp_path):
    small, wide = draw_image("a.png", 112, 112), draw_image("b.png", 224, 112)
    turns = [{"from": "human", "value": "<image>\nWhere?"}, {"from": "gpt", "value": "here"}]
    two = [{"from": "human", "value": "<image><image>\nWhere?"}, {"from": "gpt", "value": "here"}]
    text = [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "here"}]
    rows = [
        {"image": [small], "conversations": turns},
        {"image": [small], "conversations": turns},
        {"image": [small, wide], "conversations": two},
        {"conversations": text},
        {"image": ["missing.png"], "conversations": turns},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    config = DataConfig(train=[str(tmp_path / "rows.jsonl")], media_root=str(tmp_path))
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        dataset = build_dataset(config, encoder, config.train, ledger)
    histogram = sample_histogram(dataset)
    grids = [encoder.processor.image_grid(112, 112).patches, encoder.processor.image_grid(112, 224).patches]
    assert histogram.num_samples == 4
    found = dict(
        zip(histogram.patches.tolist(), zip(histogram.counts, histogram.frame_patches, strict=True), strict=True)
    )
    assert found[0] == (1, 0.0)
    assert found[grids[0]] == (2, grids[0])
    assert found[sum(grids)] == (1, sum(grid**2 for grid in grids) / sum(grids))
    tokens, patches = dataset.sizes.T
    unit = shape.vision.merge_unit
    assert sorted(np.repeat(histogram.tokens(unit), histogram.counts).tolist()) == sorted(tokens.tolist())
    assert histogram.patches @ histogram.counts == patches.sum()
    assert "1 rows refused" in histogram.source


def test_rb_data_stats_writes_what_rb_plan_reads(folder, draw_image, tmp_path, capsys):
    image = draw_image("a.png", 112, 112)
    turns = [{"from": "human", "value": "<image>\nWhere?"}, {"from": "gpt", "value": "here"}]
    rows = [{"image": [image], "conversations": turns}, {"image": ["missing.png"], "conversations": turns}]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    words = [f"data.train=[{tmp_path / 'rows.jsonl'}]", f"model.hf_path={folder}", f"--out={tmp_path / 'stats.json'}"]
    assert cli.main(["data", "stats", *words]) == 0
    assert "1 samples" in capsys.readouterr().out
    assert load_histogram(tmp_path / "stats.json").num_samples == 1
    (line,) = (tmp_path / "stats.ledger.jsonl").read_text().splitlines()
    assert "missing.png" in line
