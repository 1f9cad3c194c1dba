"""Composing a config: strict keys and types, one clear sentence when something is wrong, and a faithful file form."""

import ast
import inspect
from pathlib import Path

import pytest

from megatron_rb.config.compose import config_from_file, group_choices, load_config, save_config
from megatron_rb.config.schema import Config


def test_defaults_need_no_override():
    config = load_config([])
    assert isinstance(config, Config)
    assert config.run_dir == "runs/run"


def test_command_line_wins_over_the_recipe():
    config = load_config(["parallel.tp_size=1", "experiment=demo", "name=mine"])
    assert (config.parallel.tp_size, config.parallel.pp_size) == (1, 2)
    assert config.run_dir == "runs/mine"


def test_group_choice_wins_over_the_recipe():
    assert load_config(["experiment=demo", "parallel=single"]).parallel.pp_size == 1


def test_scientific_notation_is_a_number():
    assert load_config(["optimizer.lr=1e-4"]).optimizer.lr == 1e-4


def test_a_whole_section_can_be_given_as_a_mapping():
    recompute = load_config(["model.recompute={vision: 3}"]).model.recompute
    assert (recompute.vision, recompute.language) == (3, 0)


@pytest.mark.parametrize("text", ["P v*3 | v M E t*4 L", "a,b", "it's", "50% (of it)"])
def test_text_settings_take_special_characters_bare(text: str):
    assert load_config([f"parallel.layout={text}"]).parallel.layout == text


def test_environment_values_keep_their_spaces():
    config = load_config(["cluster.env.FLAGS=-a -b 'c d'", "cluster.env.N=3"])
    assert config.cluster.env == {"FLAGS": "-a -b 'c d'", "N": "3"}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallel.tpp_size=2"], ["parallel.tpp_size", "parallel.tp_size"]),
        (["+parallel.foo=2"], ["parallel.foo"]),
        (["tp_size=2"], ["'tp_size'", "parallel.tp_size"]),
        (["paralel=tp2"], ["'paralel'", "parallel"]),
        (["optimizer.learning_rate=1"], ["optimizer.learning_rate"]),
        (["model.recompute={visoin: 3}"], ["model.recompute.visoin", "model.recompute.vision"]),
        (["experiment=demoo"], ["experiment", "demoo", "did you mean demo?"]),
        (["parallel=tp3"], ["parallel", "tp3", "tp2_pp2"]),
        (["parallel.tp_size=four"], ["parallel.tp_size", "whole number", "'four'"]),
        (["parallel.tp_size=2.5"], ["parallel.tp_size", "whole number", "2.5"]),
        (["data.train=x.jsonl"], ["data.train", "list"]),
        (["model.hf_path=null"], ["model.hf_path", "text", "None"]),
        (["seed=1,2"], ["seed=1,2", "one value"]),
        (["data.train=[a"], ["data.train=[a", "quotes"]),
        (["name=${nope}"], ["name", "nope"]),
        (["demo"], ["'demo'", "key=value"]),
        (["~name=x"], ["~name", "key=value"]),
        (["model.dtype=fp16"], ["model.dtype", "fp16", "bf16 or fp32"]),
        (["schedule.warmup_ratio=3"], ["schedule.warmup_ratio", "3", "between 0 and 1"]),
        (["data.seq_length=0"], ["data.seq_length", "0", "at least 1"]),
        (["optimizer.lr=nan"], ["optimizer.lr", "nan"]),
        (["optimizer.lr=1e400"], ["optimizer.lr is inf", "finite"]),
        (["cluster.silence_seconds=inf"], ["cluster.silence_seconds is inf", "finite"]),
        (["seed=-1"], ["seed is -1", "between 0 and"]),
        (["seed=99999999999999999999"], ["seed is 99999999999999999999", "between 0 and"]),
        (["schedule.epochs=0"], ["schedule.epochs", "above 0"]),
    ],
)
def test_wrong_input_is_one_sentence_that_names_it(overrides: list[str], words: list[str]):
    with pytest.raises(ValueError) as error:
        load_config(overrides)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("recipe", group_choices("experiment"))
def test_saved_config_is_read_back_unchanged(recipe: str, tmp_path: Path):
    config = load_config([f"experiment={recipe}", "cluster.env.A='x: \\${y}, é'"])
    save_config(config, tmp_path / "run" / "config.yaml")
    assert config_from_file(tmp_path / "run" / "config.yaml") == config


def test_wrong_key_in_a_file_is_refused(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("parallel:\n  tpp_size: 2\n")
    with pytest.raises(ValueError, match=r"config.yaml: there is no setting 'parallel.tpp_size'"):
        config_from_file(tmp_path / "config.yaml")


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [1\n", "just words"])
def test_file_that_is_not_a_config_is_refused(content: str, tmp_path: Path):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match="config.yaml"):
        config_from_file(tmp_path / "config.yaml")


def test_missing_file_is_named():
    with pytest.raises(ValueError, match="no config file nowhere.yaml"):
        config_from_file("nowhere.yaml")


def test_every_setting_is_documented():
    tree = ast.parse(Path(inspect.getfile(Config)).read_text())
    bare = []
    for section in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for item, following in zip(section.body, [*section.body[1:], None], strict=True):
            is_section = isinstance(item, ast.AnnAssign) and ast.unparse(item.annotation).endswith("Config")
            explained = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            if isinstance(item, ast.AnnAssign) and not is_section and not explained:
                bare.append(f"{section.name}.{ast.unparse(item.target)}")
    assert bare == []
