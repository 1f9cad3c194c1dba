"""Nothing to score or to draw is an error, not a success."""

import pytest

from megatron_rb.evaluation.evaluate import load_benchmark
from megatron_rb.evaluation.value_plot import plot_episodes


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
