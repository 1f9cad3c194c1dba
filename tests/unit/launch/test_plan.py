"""The plan of an attempt on the disk, and which attempt owns the run."""

from pathlib import Path

import pytest

from megatron_rb.launch.plan import AttemptPlan, fence_file, give_up_ownership, load_plan, owner


@pytest.fixture
def plan() -> AttemptPlan:
    return AttemptPlan(3, "run/3-abc", ("b", "a"), "10.0.0.2", 29500, {"step": 1.5}, "a")


def test_a_plan_is_read_as_it_was_written(tmp_path: Path, plan: AttemptPlan):
    plan.save(tmp_path)
    assert load_plan(tmp_path, 3) == plan


def test_nobody_owns_a_run_before_its_first_attempt(tmp_path: Path):
    assert owner(tmp_path) == ""


def test_the_newest_plan_owns_the_run(tmp_path: Path, plan: AttemptPlan):
    plan.save(tmp_path)
    AttemptPlan(4, "run/4-def", ("a",), "10.0.0.1", 29500).save(tmp_path)
    assert owner(tmp_path) == "run/4-def"
    assert load_plan(tmp_path, 3) == plan


def test_an_attempt_that_has_given_up_may_not_write_any_more(tmp_path: Path, plan: AttemptPlan):
    plan.save(tmp_path)
    give_up_ownership(tmp_path, plan)
    assert owner(tmp_path) != plan.id
    assert fence_file(tmp_path).read_text().startswith(plan.id)
