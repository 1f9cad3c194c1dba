"""Processes of one machine that each see one device: their own, or one and the same."""

import pytest

from tests.distributed.world import run_world

CASE = "tests.distributed.cases_devices:own_device"


def run_with_musa(case: str, variables: list[dict[str, str]]) -> list:
    """The device has to be there before the package looks at the devices, so the interpreters are new ones."""
    return run_world(case, 2, timeout=60, fresh=True, variables=variables)


@pytest.mark.parametrize(
    "variables",
    [
        [{"MUSA_VISIBLE_DEVICES": "0"}, {"MUSA_VISIBLE_DEVICES": "1"}],
        [{"MUSA_VISIBLE_DEVICES": "GPU-4a"}, {"MUSA_VISIBLE_DEVICES": "GPU-4b"}],
        [{"MUSA_VISIBLE_DEVICES": "0", "SLURM_STEP_GPUS": str(device)} for device in (6, 7)],
    ],
    ids=["numbers", "names", "cgroup"],
)
def test_every_rank_takes_the_one_device_that_it_was_given(variables):
    assert run_with_musa(CASE, variables)[0] == ["musa:0", "musa:0"]


def test_two_ranks_on_one_device_are_refused_with_both_named():
    said = run_with_musa(CASE, [{"MUSA_VISIBLE_DEVICES": "0"}] * 2)[0]
    assert said[0] == "musa:0"
    assert said[1].startswith("local ranks 0 and 1 of ") and "see one and the same musa device" in said[1]


def test_doctor_counts_the_devices_of_processes_that_see_one_each():
    variables = [{"MUSA_VISIBLE_DEVICES": str(device)} for device in (0, 1)]
    assert run_with_musa("tests.distributed.cases_devices:doctor", variables)[0] == [2, 2]
