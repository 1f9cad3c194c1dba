"""What a setting may be on its own is said before anything starts, and is what the code behind it knows."""

from operator import attrgetter
from typing import Any

import pytest

from megatron_rb.config.rules import CHOICES, DECAYS, LEAST, check_values
from megatron_rb.config.schema import Config
from megatron_rb.kernels.dispatch import TABLE
from megatron_rb.tasks.build import TASKS


def config_with(key: str, value: Any) -> Config:
    config = Config()
    section, _, name = key.rpartition(".")
    setattr(attrgetter(section)(config) if section else config, name, value)
    return config


@pytest.mark.parametrize("key", CHOICES)
def test_a_name_that_nobody_knows_is_refused_with_those_that_are_known(key: str):
    with pytest.raises(ValueError, match=f"{key} 'nonsense' is not known; use {CHOICES[key][0]}"):
        check_values(config_with(key, "nonsense"))


@pytest.mark.parametrize("key", LEAST)
def test_a_number_below_the_least_is_refused(key: str):
    with pytest.raises(ValueError, match=f"{key} is .*; it must be at least {LEAST[key]:g}"):
        check_values(config_with(key, LEAST[key] - 1))


@pytest.mark.parametrize("value", [1, 1.5, -0.1, float("nan")])
@pytest.mark.parametrize("key", DECAYS)
def test_a_running_mean_that_never_forgets_is_refused(key: str, value: float):
    with pytest.raises(ValueError, match=f"{key} is {value}; it must be at least 0 and below 1"):
        check_values(config_with(key, value))


@pytest.mark.parametrize("operator", [operator for operator in TABLE if operator != "qk_norm_mrope"])
def test_names_of_kernels_are_those_of_their_table(operator: str):
    assert CHOICES[f"kernels.{operator}"] == ("auto", *(row.name for row in TABLE[operator]))


def test_names_of_tasks_are_those_that_are_built():
    assert CHOICES["task.name"] == tuple(TASKS)


def test_a_part_with_qk_norm_follows_the_setting_of_the_one_without():
    assert [row.name for row in TABLE["qk_norm_mrope"]] == [row.name for row in TABLE["mrope"]]
