"""Every command answers `--help` with its usage; the tables of commands name every file of tools/ and no other."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rb import cli
from megatron_rb.tools import bench, compare, value
from megatron_rb.tools.train import main as train

TOOLS = Path(__file__).parents[3] / "tools"
TABLES = {".": cli.COMMANDS, "bench": bench.COMMANDS, "compare": compare.COMMANDS, "value": value.COMMANDS}
"""Of each folder below tools/."""
PARTS = [[word, part] for word, table in TABLES.items() if word != "." for part in table]
CONVERT = [["convert", way] for way in ("import", "export", "from-megatron", "migrate", "inspect", "verify")]


@pytest.mark.parametrize("words", [*([name] for name in cli.COMMANDS), *PARTS, *CONVERT], ids=" ".join)
def test_help_tells_the_usage(words: list[str], capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([*words, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert left.value.code in (0, None)
    assert said.startswith(f"usage: rb {' '.join(words)} [-h]")


def test_every_folder_of_commands_has_a_table():
    folders = {str(path.parent.relative_to(TOOLS)) for path in TOOLS.rglob("*.py")}
    assert folders == set(TABLES)


@pytest.mark.parametrize("folder", TABLES)
def test_table_tells_every_file_by_the_first_line_of_its_docstring(folder: str):
    told = {word: command.summary for word, command in TABLES[folder].items()}
    assert told == dict(summaries_of_files(TOOLS / folder))


def summaries_of_files(folder: Path) -> Iterator[tuple[str, str]]:
    for path in [*folder.glob("*.py"), *folder.glob("*/__init__.py")]:
        if path != folder / "__init__.py":
            word = path.parent.name if path.name == "__init__.py" else path.stem
            docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
            yield word.replace("_", "-"), docstring.splitlines()[0]


@pytest.mark.parametrize("folder", TABLES)
def test_word_runs_the_file_of_its_name(folder: str, monkeypatch):
    run: list[str] = []
    prefix = "megatron_rb.tools" if folder == "." else f"megatron_rb.tools.{folder}"
    for word in TABLES[folder]:
        name = f"{prefix}.{word.replace('-', '_')}"
        monkeypatch.setattr(f"{name}.main", lambda argv, name=name: run.append(name) or 7)
        assert TABLES[folder][word].run([]) == 7
        assert run.pop() == name


@pytest.mark.parametrize("word", [word for word in TABLES if word != "."])
def test_help_of_a_word_lists_its_parts(word: str, capsys):
    with pytest.raises(SystemExit):
        cli.main([word, "--help"])
    said = capsys.readouterr().out
    assert [part for part, command in TABLES[word].items() if command.summary not in said] == []


def test_list_of_commands_imports_nothing_that_it_need_not():
    code = "import sys; from megatron_rb import cli; cli.main([]); print({'torch', 'rich', 'yaml'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "set()", done.stderr


def test_train_refuses_settings_beside_a_whole_config():
    with pytest.raises(ValueError, match="--config run/config.yaml holds every setting; leave out optimizer.lr=1"):
        train(["--config", "run/config.yaml", "optimizer.lr=1"])
