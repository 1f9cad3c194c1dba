"""`docs/settings.md` is what the schema says today."""

import dataclasses
from pathlib import Path

import pytest

from megatron_rb.config.compose import setting_types
from megatron_rb.config.schema import AdapterConfig
from megatron_rb.config.settings_page import main, page, sections, values

PAGE = Path(__file__).parents[3] / "docs/settings.md"


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == page(), "run `make settings`"


def test_every_setting_has_one_row():
    settings = [key for key, declared in setting_types().items() if not dataclasses.is_dataclass(declared)]
    settings += [f"model.adapters.NAME.{item.name}" for item in dataclasses.fields(AdapterConfig)]
    rows = [line.key for section in sections() for line in section.lines]
    assert sorted(rows) == sorted(settings)


def test_every_setting_says_what_it_means():
    assert [line.key for section in sections() for line in section.lines if not line.meaning] == []


def test_every_row_has_five_cells_whatever_the_schema_says():
    rows = [line for line in page().splitlines() if line.startswith("| `")]
    assert rows and {row.count("|") for row in rows} == {6}
    assert "<code>P v&#42;20 &#124; v&#42;12 M E t&#42;4 &#124; t&#42;12 &#124; t&#42;12 L</code>" in page()


@pytest.mark.parametrize(
    ("key", "allowed"),
    [
        ("model.dtype", "`bf16`, `fp32`"),
        ("data.seq_length", "at least 1"),
        ("optimizer.eps", "above 0"),
        ("optimizer.beta1", "at least 0, below 1"),
        ("schedule.warmup_ratio", "0 to 1"),
        ("name", ""),
    ],
)
def test_values_are_those_of_the_rules(key: str, allowed: str):
    assert values(key) == allowed


def test_defaults_are_written_as_the_command_line_takes_them():
    row = next(line for line in page().splitlines() if line.startswith("| `metrics.progress` |"))
    assert row == "| `metrics.progress` | `bool` | `true` |  | Show a progress bar on rank 0. |"


def test_the_command_writes_the_page(tmp_path):
    assert main([str(tmp_path / "settings.md")]) == 0
    assert (tmp_path / "settings.md").read_text() == PAGE.read_text()
