"""The metrics file: what survives, and what a resumed run drops."""

import json
import math

from megatron_rb.metrics.jsonl import JsonlWriter, read_metrics
from megatron_rb.metrics.record import EvalRecord
from tests.unit.metrics.records import RATES, step_record


def write(path, steps, first_step=0):
    writer = JsonlWriter(path, first_step)
    for step in steps:
        writer.write_step(step_record(step))
    writer.close()


def steps_in(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_line_is_on_disk_at_once_and_holds_the_rates(tmp_path):
    writer = JsonlWriter(tmp_path / "new" / "metrics.jsonl", 0)
    writer.write_step(step_record(1, num_tokens=300, num_patches=1000, seconds=4.0))
    line = json.loads((tmp_path / "new" / "metrics.jsonl").read_text())
    assert (line["kind"], line["tokens_per_second"], line["patches_per_second"]) == ("step", 75.0, 250.0)
    assert line["learning_rates"] == RATES
    writer.close()


def test_numbers_that_are_not_finite_survive_as_valid_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path, 0)
    writer.write_step(step_record(1, loss=float("nan"), grad_norm=float("inf")))
    writer.write_step(step_record(2, grad_norm=None))
    writer.write_eval(EvalRecord(2, {"loss": float("nan")}))
    writer.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    first, second, evaluation = (json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines())
    assert math.isnan(float(first["loss"])) and float(first["grad_norm"]) == math.inf
    assert second["grad_norm"] is None and evaluation["values"] == {"loss": "nan"}


def test_resume_drops_the_lines_past_the_resumed_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3, 4, 5])
    write(path, [4, 5, 6], first_step=3)
    assert steps_in(path) == [1, 2, 3, 4, 5, 6]


def test_resume_drops_later_evaluations_and_keeps_the_one_of_the_resumed_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path, 0)
    for step in (1, 2):
        writer.write_step(step_record(step))
        writer.write_eval(EvalRecord(step, {"loss": 1.0}))
    writer.close()
    JsonlWriter(path, 1).close()
    steps, evaluations = read_metrics(path)
    assert [entry["step"] for entry in steps + evaluations] == [1, 1]


def test_a_line_that_a_crash_cut_off_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2])
    path.write_bytes(path.read_bytes()[:-20])
    write(path, [2, 3], first_step=2)
    assert steps_in(path) == [1, 2, 3]


def test_a_lost_newline_does_not_join_two_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1])
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    write(path, [2], first_step=1)
    assert steps_in(path) == [1, 2]


def test_a_new_run_starts_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2])
    JsonlWriter(path, 0).close()
    assert path.read_text() == ""


def test_the_later_of_two_lines_of_one_step_counts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path, 0)
    writer.write_eval(EvalRecord(3, {"loss": 2.0}))
    writer.write_eval(EvalRecord(3, {"loss": 1.0}))
    writer.close()
    assert [entry["values"]["loss"] for entry in read_metrics(path)[1]] == [1.0]
