"""Which writers a run gets, and what TensorBoard reads after a resume."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_rb.config.schema import MetricsConfig
from megatron_rb.metrics.record import EvalRecord
from megatron_rb.metrics.writers import CompositeWriter, PlotWriter, TensorBoardWriter, build_writers
from tests.unit.metrics.records import step_record


def test_rank_zero_writes_everything_that_is_asked_for(tmp_path, capsys):
    writer = build_writers(MetricsConfig(), tmp_path, train_steps=2, first_step=0, is_rank_zero=True)
    for step in (1, 2):
        writer.write_step(step_record(step))
    writer.write_eval(EvalRecord(2, {"loss": 1.0}))
    writer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl", "tensorboard"]
    assert "step 2/2" in capsys.readouterr().out


def test_without_tensorboard_and_plots_there_is_the_file_alone(tmp_path):
    config = MetricsConfig(tensorboard=False, plots=False)
    build_writers(config, tmp_path, train_steps=2, first_step=0, is_rank_zero=True).close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_other_ranks_write_nothing(tmp_path):
    writer = build_writers(MetricsConfig(), tmp_path, train_steps=2, first_step=0, is_rank_zero=False)
    writer.write_step(step_record(1))
    writer.write_eval(EvalRecord(1, {}))
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_hides_the_steps_that_are_done_again(tmp_path):
    for first_step, loss in ((0, 3.0), (2, 1.0)):
        writer = TensorBoardWriter(tmp_path, first_step)
        for step in range(first_step + 1, first_step + 5):
            writer.write_step(step_record(step, loss=loss, grad_norm=None))
        writer.write_eval(EvalRecord(first_step + 4, {"loss": loss}))
        writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(1, 3.0), (2, 3.0), (3, 1.0), (4, 1.0), (5, 1.0), (6, 1.0)]
    assert "train/grad_norm" not in events.Tags()["scalars"]
    assert [event.step for event in events.Scalars("evaluation/loss")] == [6]


def test_a_plot_that_cannot_be_drawn_does_not_end_the_run(tmp_path, caplog):
    writer = PlotWriter(tmp_path / "missing.jsonl", tmp_path / "curves.png")
    writer.write_step(step_record(1))
    writer.close()
    assert "curves.png was not drawn" in caplog.text


def test_every_writer_is_closed_when_one_fails():
    closed = []

    class Recorder:
        def __init__(self, name, fails):
            self.name, self.fails = name, fails

        def close(self):
            closed.append(self.name)
            if self.fails:
                raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        CompositeWriter([Recorder("first", True), Recorder("second", False)]).close()
    assert closed == ["first", "second"]
