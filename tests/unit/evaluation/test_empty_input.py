"""Nothing to score or to draw is an error, not a success."""

from pathlib import Path

import pytest

from megatron_rb.data.answer_file import read_answers
from megatron_rb.evaluation.evaluate import load_benchmark
from megatron_rb.evaluation.value_plot import plot_episodes
from megatron_rb.evaluation.value_scores import read_curves


def test_rows_that_are_none_are_refused_before_anything_is_written(tmp_path):
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(ValueError, match="rows.jsonl is empty; rb eval needs rows with their truth"):
        load_benchmark(tmp_path / "rows.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_questions_that_are_none_are_refused(tmp_path):
    (tmp_path / "data.json").write_text("[]")
    with pytest.raises(ValueError, match="data.json holds no question"):
        load_benchmark(tmp_path, tmp_path / "out")


def test_curves_that_are_none_are_refused(tmp_path):
    for name in ("curves.jsonl", "episodes.jsonl"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="curves.jsonl is empty; rb value score writes a line per episode"):
        list(plot_episodes(tmp_path / "curves.jsonl", tmp_path / "episodes.jsonl", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [("[1, 2]", "it holds a list, not an object"), ("7", "it holds a int, not an object"), ("[" * 9999, "too deep")],
)
def test_a_line_that_is_no_object_is_told_as_what_it_is(tmp_path, line: str, said: str):
    file = tmp_path / "lines.jsonl"
    file.write_text(line)
    readers = [lambda: load_benchmark(file, tmp_path / "out"), lambda: read_curves(file)]
    for read in readers if line[1:2] == "[" else [*readers, lambda: read_answers(_listed(file))]:
        with pytest.raises(ValueError, match=said):
            read()


def _listed(file: Path) -> Path:
    """Answers may be one JSON list; its entries are lines here."""
    file.write_text(f"[{file.read_text()}]")
    return file
