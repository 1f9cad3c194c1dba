"""The picture of a run and the numbers in it."""

import numpy as np
import pytest
from PIL import Image

from megatron_rb.metrics.jsonl import JsonlWriter
from megatron_rb.metrics.record import EvalRecord
from megatron_rb.metrics.report import column, plot_curves, smoothed
from tests.unit.metrics.records import step_record


@pytest.mark.parametrize("count", [1, 3, 60])
def test_a_run_of_any_length_becomes_a_picture(tmp_path, count):
    writer = JsonlWriter(tmp_path / "metrics.jsonl", 0)
    for step in range(1, count + 1):
        loss = float("nan") if step == 2 else 3.0 / step
        writer.write_step(step_record(step, loss=loss, grad_norm=None if step == 1 else 100.0 / step))
        if step % 20 == 0:
            writer.write_eval(EvalRecord(step, {"loss": 3.2 / step, "accuracy": 0.5}))
    writer.close()
    plot_curves(tmp_path / "metrics.jsonl", tmp_path / "plots" / "curves.png")
    with Image.open(tmp_path / "plots" / "curves.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["curves.png"]


def test_a_file_without_steps_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="holds no steps yet"):
        plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")


def test_smoothing_weighs_by_distance_and_passes_over_gaps():
    # Weights 1, 2, 1 around every point; ends and gaps fall out.
    values = smoothed(np.array([1.0, 3.0, np.nan, 6.0, np.inf, np.nan, np.nan]))
    assert values[:5] == pytest.approx([5 / 3, 7 / 3, 4.5, 6.0, 6.0])
    assert np.isnan(values[5:]).all()


def test_absent_and_written_out_numbers_become_floats():
    values = column([{"loss": 1.5}, {"loss": None}, {"loss": "inf"}], "loss")
    assert values[0] == 1.5 and np.isnan(values[1]) and values[2] == np.inf
