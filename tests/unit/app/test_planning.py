"""Planning from the settings of a run, and what a dry run says about memory."""

from pathlib import Path

import pytest

from megatron_rb.app.planning import maybe_plan, memory_forecast, read_bytes, read_request
from megatron_rb.config.compose import config_from_file, load_config, save_config
from megatron_rb.config.derive import derive
from tests.unit.planner.cases import mixed_histogram, published, tiny


@pytest.fixture
def stats(tmp_path: Path) -> str:
    mixed_histogram().save(tmp_path / "stats.json")
    return f"data={tmp_path / 'stats.json'}"


def model_folder(folder: Path) -> str:
    """A folder with the config.json of a published model."""
    import json

    from megatron_rb.shapes.published import CONFIGS

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS["RoboBrain2.0-7B"]))
    return str(folder)


def test_auto_fills_in_the_layout_of_a_run(tmp_path: Path, stats: str, capsys):
    hf = model_folder(tmp_path / "hf")
    words = ["parallel=auto", f"model.hf_path={hf}", "world_size=16", "planner.device=h100", "data.seq_length=8192"]
    config = maybe_plan(load_config([*words, f"planner.histogram={stats.partition('=')[2]}"]))
    assert not config.parallel.auto
    derived = derive(config, published("RoboBrain2.0-7B"))
    assert derived.world_size == 16 and derived.layout is not None
    assert "parallel=auto: nominal prediction, not a measurement" in capsys.readouterr().out
    save_config(config, tmp_path / "config.yaml")
    assert config_from_file(tmp_path / "config.yaml") == config


def test_a_run_with_a_layout_stays_as_it_is():
    config = load_config(["experiment=robobrain20_7b_stage1"])
    assert maybe_plan(config) is config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "how many processes there are; give world_size="),
        (["world_size=8"], "needs to know the devices; give planner.device=a800, cpu"),
        (["world_size=8", "planner.device=h2000"], "no device 'h2000'"),
    ],
)
def test_auto_says_what_it_has_to_know(words: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        maybe_plan(load_config(["parallel=auto", *words]))


def test_training_refuses_an_unplanned_run():
    with pytest.raises(ValueError, match="parallel=auto is planned by `rb launch`"):
        derive(load_config(["parallel=auto"]), tiny())


def test_forecast_counts_the_part_of_a_context_parallel_rank():
    shape, totals = published("RoboBrain2.0-32B"), []
    for cp in (1, 2):
        config = load_config(["experiment=robobrain20_32b_cot", f"parallel.cp_size={cp}", "world_size=128"])
        lines = memory_forecast(config, derive(config, shape), shape)
        totals.append([float(line.split()[-1]) for line in lines[2:]])
    assert all(half < whole for half, whole in zip(totals[1], totals[0], strict=True))


def test_forecast_has_a_line_for_every_stage():
    config = load_config(["experiment=robobrain20_32b_cot"])
    lines = memory_forecast(config, derive(config, published("RoboBrain2.0-32B")), published("RoboBrain2.0-32B"))
    assert "not a measurement, without what context and libraries take" in lines[0]
    totals = [float(line.split()[-1]) for line in lines[2:]]
    assert len(totals) == 4 and totals[0] > totals[3] > 20


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=robobrain20_7b", "gpus=8", "data=x"], "rb plan needs cluster"),
        (["cluster=h200", "gpus=8", "data=x"], "rb plan needs a model"),
        (["model=robobrain20_7b", "cluster=h200", "gpus=8", "dat=x"], "rb plan knows no 'dat'; did you mean data"),
        (["model=robobrain20_7b", "cluster=h200", "gpus=eight", "data=x"], "there is no histogram x|whole number"),
        (["model=robobrain99", "cluster=h200", "gpus=8", "data=x"], "model 'robobrain99' is neither"),
        (["model=robobrain20_7b", "cluster=h200", "gpus=8", "data=nothing.json"], "there is no histogram nothing.json"),
        (["model=robobrain20_7b", "cluster=h200", "gpus=8", "max_gpu_memory=80XB", "data=x"], "is no size"),
    ],
)
def test_words_that_cannot_be_meant(words: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        read_request(words)


def test_words_reach_the_task(stats: str):
    words = ["experiment=robobrain20_32b_cot", "model=robobrain20_32b", "tp=8", "cluster=a800", "gpus=64", stats]
    words += ["cp=2", "max_gpu_memory=70GiB"]
    words += ["global_batch_size=128", "model.freeze.vision=true", "sequence_parallel=true"]
    request = read_request(words)
    assert request.shape.text.num_layers == 64
    assert request.config.data.seq_length == 32768 and request.config.data.global_batch_size == 128
    assert request.config.model.freeze.vision
    assert request.device.memory == 70 * 2**30
    assert request.asked == {"tp": 8, "cp": 2, "sequence_parallel": 1}


def test_sizes_in_words():
    assert [read_bytes(text) for text in ("80e9", "80GB", "1.5GiB")] == [80e9, 80e9, 1.5 * 2**30]
