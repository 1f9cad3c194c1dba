"""A text setting keeps its text as it was written, wherever it is written."""

import dataclasses
import inspect
import re
import shutil
import sys
import typing
from importlib import resources
from pathlib import Path

import pytest

from megatron_rb.config import compose, schema
from megatron_rb.config.compose import config_from_file, expand_sweep, load_config, save_config, setting_types

# What YAML 1.1, OmegaConf or Hydra's grammar would read as a number, a truth value, a date or nothing.
TEXTS = [
    "12:30:00",
    "1:30",
    "0012345",
    "010",
    "0o17",
    "0x1F",
    "1e3",
    "1e-4",
    "1.10",
    "1_000",
    "+5",
    "-0",
    ".5",
    "on",
    "off",
    "yes",
    "No",
    "true",
    "True",
    "nan",
    ".inf",
    "inf",
    "2026-11-30",
    "2-00:00:00",
    "1-12",
    "y",
    "=",
    "None",
]


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the recipes that a test may add files to."""
    folder = tmp_path / "site" / "conf_of_a_test"
    shutil.copytree(str(resources.files(compose.CONF_MODULE)), folder)
    monkeypatch.delitem(sys.modules, folder.name, raising=False)
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setattr(compose, "CONF_MODULE", folder.name)
    return folder


@pytest.mark.parametrize("text", TEXTS)
def test_command_line_keeps_a_text(text: str):
    config = load_config(
        [
            f"cluster.slurm.time={text}",
            f"cluster.env.A={text}",
            f"cluster.env={{B: {text}}}",
            f"cluster.slurm.options=[{text}, x]",
            f"cluster.slurm={{qos: {text}}}",
        ]
    )
    slurm = config.cluster.slurm
    assert (slurm.time, slurm.qos, slurm.options, config.cluster.env) == (
        text,
        text,
        [text, "x"],
        {"A": text, "B": text},
    )


@pytest.mark.parametrize("text", [text for text in TEXTS if text != "="])
def test_settings_file_keeps_a_text(text: str, tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"name: {text}\ncluster:\n  env: {{{text}: {text}}}\n  node_env:\n    {text}: {{A: {text}}}\n"
        f"  secrets: [{text}]\n  slurm:\n    account: {text}\n"
    )
    for config in (load_config([f"settings={file}"]), config_from_file(file)):
        cluster = config.cluster
        assert (config.name, cluster.slurm.account, cluster.secrets) == (text, text, [text])
        assert (cluster.env, cluster.node_env) == ({text: text}, {text: {"A": text}})


@pytest.mark.parametrize("text", ["12:30:00", "010", "1e3", "on"])
def test_site_file_keeps_a_text(conf: Path, text: str):
    (conf / "cluster" / "mysite.yaml").write_text(f"defaults: [slurm]\nslurm:\n  time: {text}\nenv:\n  A: {text}\n")
    cluster = load_config(["cluster=mysite"]).cluster
    assert (cluster.name, cluster.slurm.time, cluster.env) == ("slurm", text, {"A": text})


@pytest.mark.parametrize("name", ["2026", "1e3", "010", "on"])
def test_site_file_may_be_named_like_a_number(conf: Path, name: str):
    (conf / "cluster" / f"{name}.yaml").write_text("name: slurm\n")
    assert load_config([f"cluster={name}"]).cluster.name == "slurm"


def test_a_recipe_placed_in_another_section_keeps_its_texts(conf: Path):
    (conf / "cluster" / "times.yaml").write_text("# @package cluster.slurm\ntime: 12:30:00\n")
    (conf / "cluster" / "mysite.yaml").write_text("defaults: [slurm, times]\n")
    assert load_config(["cluster=mysite"]).cluster.slurm.time == "12:30:00"


@pytest.mark.parametrize("text", TEXTS)
def test_saved_config_keeps_a_text(text: str, tmp_path: Path):
    config = load_config([f"name={text}", f"cluster.env.A={text}"])
    save_config(config, tmp_path / "config.yaml")
    assert config_from_file(tmp_path / "config.yaml") == config


def test_numbers_in_files_stay_numbers(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("optimizer: {lr: 1e-4, eps: 1.5e-8}\nseed: 1_000\nmetrics: {plots: off}\n")
    config = load_config([f"settings={file}"])
    assert (config.optimizer.lr, config.optimizer.eps, config.seed, config.metrics.plots) == (1e-4, 1.5e-8, 1000, False)


def test_numbers_in_files_are_to_the_base_of_ten(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("seed: 010\n")
    assert load_config([f"settings={file}"]).seed == load_config(["seed=010"]).seed == 10
    file.write_text("cluster: {grace_seconds: 1:30}\n")
    with pytest.raises(ValueError, match="cluster.grace_seconds must be a number, got '1:30'"):
        load_config([f"settings={file}"])


def test_a_list_without_brackets_is_said_to_be_one():
    with pytest.raises(ValueError, match=r"cluster.slurm.options must be a list, e.g. \[a,b\], got '--mem=0'"):
        load_config(["cluster.slurm.options=--mem=0"])


def test_no_choice_is_named_null():
    with pytest.raises(ValueError, match="cluster has no choice 'null'; there are local, slurm, ssh"):
        load_config(["cluster=null"])


@pytest.mark.parametrize("nothing", ["null", "~", ""])
def test_nothing_is_no_text_in_a_file(nothing: str, tmp_path: Path):
    (tmp_path / "mine.yaml").write_text(f"cluster:\n  slurm:\n    qos: {nothing}\n")
    with pytest.raises(ValueError, match=r"mine.yaml: cluster.slurm.qos must be a text, got None; write ''"):
        load_config([f"settings={tmp_path / 'mine.yaml'}"])


def test_quotes_and_blocks_are_texts_without_them(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("cluster:\n  env: {A: '010', B: \"on\", C: 'null'}\n  python: |\n    a\n    b\n")
    config = load_config([f"settings={file}", "cluster.env.D='1.10'", "cluster.env.E='null'"])
    assert config.cluster.env == {"A": "010", "B": "on", "C": "null", "D": "1.10", "E": "null"}
    assert config.cluster.python == "a\nb\n"


def test_a_key_that_stands_twice_in_a_file_is_refused(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("seed: 1\nseed: 2\n")
    with pytest.raises(ValueError, match="mine.yaml is not valid YAML.*seed"):
        config_from_file(tmp_path / "mine.yaml")


def test_a_reference_to_a_text_and_to_a_number_is_resolved(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("name: 1.10\nrun_dir: runs/${name}\nworld_size: ${seed}\nseed: 4\n")
    config = config_from_file(tmp_path / "mine.yaml")
    assert (config.run_dir, config.world_size) == ("runs/1.10", 4)


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("[--exclusive, --mem=0]", ["--exclusive", "--mem=0"]),
        ("['a, b', \"c\"]", ["a, b", "c"]),
        ("[--comment=it's, b]", ["--comment=it's", "b"]),
        ("[echo $(date +[%d,%m]), b]", ["echo $(date +[%d,%m])", "b"]),
        ("[]", []),
    ],
)
def test_lists_of_texts_on_the_command_line(written: str, wanted: list[str]):
    assert load_config([f"cluster.slurm.options={written}"]).cluster.slurm.options == wanted


def test_a_sweep_over_lists_of_texts():
    assert expand_sweep(["cluster.slurm.options=[--mem=1],[--mem=2, -v]"]) == [
        ["cluster.slurm.options=[--mem=1]"],
        ["cluster.slurm.options=[--mem=2, -v]"],
    ]


def _examples() -> list[tuple[str, str]]:
    """Every example for a text, a list or a mapping of texts in the schema's documentation, with its key."""
    fields = re.findall(r'^    (\w+): [^\n]+\n    """(.*?)"""', inspect.getsource(schema), re.DOTALL | re.MULTILINE)
    documented = {name: text for name, text in fields}
    found = []
    for key, declared in setting_types().items():
        text = documented.get(key.rpartition(".")[2], "")
        inner = typing.get_args(declared)
        if declared is str or str in inner and not dataclasses.is_dataclass(inner[-1]):
            found += [(key, example) for example in re.findall(r"e\.g\. `([^`]+)`", text)]
    return found


@pytest.mark.parametrize(("key", "example"), _examples())
def test_examples_of_the_schema_are_read_as_they_stand_there(key: str, example: str, tmp_path: Path):
    (tmp_path / "mine.yaml").write_text(f"{key.replace('.', ': {')}: {example}{'}' * key.count('.')}\n")
    config: typing.Any = load_config([f"{key}={example}"])
    for name in key.split("."):
        config = getattr(config, name)
    wanted = example.strip("[]").split(", ") if isinstance(config, list) else example
    assert config == wanted


def test_the_schema_has_examples_of_texts_and_lists():
    assert {"cluster.slurm.options", "cluster.slurm.time", "cluster.slurm.exclude", "parallel.layout"} <= {
        key for key, _ in _examples()
    }
