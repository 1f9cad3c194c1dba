"""One list of numbers of a step, for the file, TensorBoard and the console."""

import dataclasses
from pathlib import Path

import pytest

from megatron_rb.metrics.columns import COLUMNS, line, tagged, values
from megatron_rb.metrics.record import StepRecord
from tests.unit.metrics.records import RATES, step_record

HALF = {"flops": 4e15, "devices": 4, "peak_flops": 1e15}
"""2 s on 4 devices: 500 TFLOP/s each, half of their peak."""


def test_every_number_of_a_record_is_written():
    given = {field.name for field in dataclasses.fields(StepRecord)} - {"devices", "peak_flops"}
    assert given <= values(step_record(1)).keys()


def test_the_documentation_lists_every_number_with_its_unit():
    page = (Path(__file__).parents[3] / "docs/training.md").read_text()
    rows = [line.split("|")[1:3] for line in page.splitlines() if line.startswith("| `")]
    documented = {name.strip(" `"): unit.strip() for name, unit in rows}
    assert {column.name: column.unit for column in COLUMNS}.items() <= documented.items()


def test_names_and_tags_stand_once():
    names, tags = [c.name for c in COLUMNS], [c.tensorboard for c in COLUMNS if c.tensorboard]
    assert len(set(names)) == len(names) and len(set(tags)) == len(tags)


def test_tflops_count_a_device_and_mfu_its_peak():
    record = step_record(1, **HALF)
    assert (record.tflops, record.mfu) == (500.0, 0.5)
    assert values(record)["tflops"] == 500.0 and values(record)["mfu"] == 0.5
    assert tagged(record)["speed/mfu"] == 0.5
    assert {"500 TFLOP/s", "MFU 50.0%"} <= set(line(record))


def test_without_a_known_peak_there_is_no_mfu():
    record = step_record(1, **HALF | {"peak_flops": None})
    assert values(record)["mfu"] is None and "speed/mfu" not in tagged(record)
    assert not any("MFU" in text for text in line(record))


def test_learning_rates_are_one_number_per_module():
    assert {tag: rate for tag, rate in tagged(step_record(1)).items() if "learning" in tag} == {
        f"learning_rate/{name}": rate for name, rate in RATES.items()
    }


@pytest.mark.parametrize(("skipped", "shown"), [(0, False), (3, True)])
def test_skipped_updates_are_shown_when_there_are_any(skipped, shown):
    assert ("3 updates skipped" in line(step_record(1, skipped_updates=skipped))) == shown
