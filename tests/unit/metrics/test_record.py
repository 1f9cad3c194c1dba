"""Rates derived from the counts of a step."""

from tests.unit.metrics.records import step_record


def test_rates_are_per_second_of_the_whole_step():
    record = step_record(1, num_tokens=300, num_patches=1000, seconds=4.0, data_wait_seconds=1.0)
    assert (record.tokens_per_second, record.patches_per_second, record.data_wait_share) == (75.0, 250.0, 0.25)


def test_a_step_without_duration_has_no_rate():
    assert step_record(1, seconds=0.0).tokens_per_second == 0.0
