"""Planning from the settings of a run, and what a dry run says about memory."""

from pathlib import Path

import pytest

from megatron_rb.app.planning import check_left_to_plan, maybe_plan, memory_forecast
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


@pytest.mark.parametrize(
    "word", ["parallel.tp_size=2", "parallel.layout=P v | t", "model.recompute.language=-1", "parallel.cp_size=2"]
)
def test_auto_refuses_a_setting_that_its_plan_would_replace(word: str):
    words = ["experiment=robobrain20_32b_stage1", "parallel=auto", word]
    with pytest.raises(ValueError, match=f"parallel=auto plans {word.partition('=')[0]} itself; leave that out"):
        check_left_to_plan(load_config(words), words)


def test_settings_that_a_plan_reads_and_those_of_a_run_with_a_layout_are_left_alone():
    for words in (["parallel=auto", "world_size=8", "planner.device=h200"], ["parallel=tp2_pp2", "parallel.tp_size=4"]):
        check_left_to_plan(load_config(words), words)


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
    config = load_config(["experiment=robobrain20_32b_cot", "recipe.devices=[]"])
    lines = memory_forecast(config, derive(config, published("RoboBrain2.0-32B")), published("RoboBrain2.0-32B"))
    assert "not a measurement, without what context and libraries take" in lines[0]
    totals = [float(line.split()[-1]) for line in lines[2:]]
    assert len(totals) == 4 and totals[0] > totals[3] > 20


def test_forecast_says_of_which_micro_batches_it_is():
    shape = published("RoboBrain2.0-32B")
    words = ["experiment=robobrain20_32b_cot", "data.seq_length=32768", "data.max_patches=65536"]
    config = load_config([*words, "planner.device=a800"])
    lines = memory_forecast(config, derive(config, shape), shape)
    assert "when a micro-batch is full (32768 tokens, 65536 patches), not a measurement" in lines[0]


def test_plan_says_of_which_micro_batches_its_memory_is(tmp_path: Path, stats: str, capsys):
    hf = model_folder(tmp_path / "hf")
    words = ["parallel=auto", f"model.hf_path={hf}", "world_size=8", "planner.device=h100", "data.seq_length=8192"]
    maybe_plan(load_config([*words, f"planner.histogram={stats.partition('=')[2]}"]))
    assert "memory    when a micro-batch is as large as the samples planned for can make it" in capsys.readouterr().out
