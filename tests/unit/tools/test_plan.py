"""`rb plan` as its user meets it."""

import json
from pathlib import Path

from PIL import Image

from megatron_rb import cli
from megatron_rb.config.compose import load_config
from tests.unit.planner.cases import mixed_histogram


def test_plan_prints_a_table_and_writes_its_files(tmp_path: Path, capsys):
    mixed_histogram().save(tmp_path / "stats.json")
    files = [f"--{kind}={tmp_path / f'plan.{kind}'}" for kind in ("json", "yaml", "png")]
    words = [
        "model=robobrain20_7b",
        "cluster=h200",
        "gpus=16",
        f"data={tmp_path / 'stats.json'}",
        "pp=2",
        "seq_length=4096",
    ]
    assert cli.main(["plan", *words, *files]) == 0
    text = capsys.readouterr().out
    assert text.startswith("nominal prediction, not a measurement")
    assert "planned in" in text and "layout    P v*" in text
    content = json.loads((tmp_path / "plan.json").read_text())
    best = content["best"]
    assert best["pp"] == 2 and best["dp"] * best["cp"] * best["tp"] == 8
    assert len(content["best"]["memory_per_stage"]) == 2
    config = load_config(["experiment=robobrain20_7b_stage1", f"settings={tmp_path / 'plan.yaml'}"])
    assert config.parallel.layout == content["best"]["layout"]
    with Image.open(tmp_path / "plan.png") as picture:
        assert picture.width > 1000


def test_wrong_words_are_one_sentence(tmp_path: Path, capsys):
    mixed_histogram().save(tmp_path / "stats.json")
    words = ["model=robobrain20_7b", "gpus=64", f"data={tmp_path / 'stats.json'}", "seq_length=4096"]
    assert cli.main(["plan", *words, "cluster=h200", "tp=8"]) == 2
    assert "tp_size 8 does not divide num_query_groups 4; use 1, 2 or 4" in capsys.readouterr().err
    assert cli.main(["plan", *words[:-1], "cluster=h200", "seq_length=512"]) == 2
    assert "samples of the histogram" in capsys.readouterr().err
    assert cli.main(["plan", *words, "cluster=mtt_s5000", "dtype=fp32"]) == 2
    assert "has no peak_flops for fp32 (it has bf16)" in capsys.readouterr().err
    assert cli.main(["plan", *words, "cluster=h200", "max_gpu_memory=2GB"]) == 2
    assert "memory binds" in capsys.readouterr().err
    assert cli.main(["plan", *words, "cluster=h200", "seq_length=512"]) == 2
    assert "seq_length is given twice, as 4096 and as 512; leave one of them out" in capsys.readouterr().err


def test_a_plan_for_more_memory_than_the_device_has_says_so(capsys):
    words = ["plan", "model=robobrain20_3b", "cluster=h200", "gpus=8", "tp=1", "pp=1", "max_gpu_memory=200gb"]
    assert cli.main(words) == 0
    assert "planned for 200 GB of memory, NVIDIA H200 SXM has 141 GB" in capsys.readouterr().out


def test_a_published_model_is_planned_without_its_folder_and_without_data(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", "model=robobrain25_4b", "cluster=h200", "gpus=8", "tp=1", "pp=1"]) == 0
    text = capsys.readouterr().out
    assert "for 20000 samples of the mix images_16k" in text and "not of data" in text
    assert "the weights of RoboBrain2.5-4B are not here: put its Hugging Face folder" in text
    assert "at models/RoboBrain2.5-4B" in text


def test_a_mix_is_planned_for_by_its_name(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["plan", "model=Qwen2.5-VL-3B-Instruct", "cluster=h200", "gpus=8", "tp=1", "pp=1"]
    assert cli.main([*words, "data=text_8k"]) == 0
    assert "of the mix text_8k (text alone" in capsys.readouterr().out
    (tmp_path / "stats.json").write_text("{}")
    (tmp_path / "stats").write_text("{}")
    for file in ("stats", "stats.json", "nowhere.json"):
        assert cli.main([*words, f"data={file}"]) == 2
        assert file in capsys.readouterr().err
    assert cli.main([*words, "data=text_9k"]) == 2
    assert "there is no mix 'text_9k'; did you mean text_8k?" in capsys.readouterr().err


def test_an_optimizer_whose_state_cannot_be_shared_out_is_refused_here_too(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["plan", "model=robobrain20_3b", "cluster=h200", "gpus=8", "tp=1", "pp=1", "optimizer.name=sgd"]
    assert cli.main(words) == 2
    assert "set parallel.distributed_optimizer=false" in capsys.readouterr().err
    assert cli.main([*words, "parallel.distributed_optimizer=false"]) == 0
