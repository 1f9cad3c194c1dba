"""What a process knows of the attempt it belongs to."""

from pathlib import Path

import pytest

from megatron_rb.parallel.attempt import Attempt, attempt_from_environment

NAMES = ("RB_ATTEMPT", "RB_FENCE", "RB_BEATS", "RB_STACKS")


@pytest.mark.parametrize("empty", [True, False])
def test_a_process_that_nobody_supervises_has_no_attempt(monkeypatch, empty):
    for name in NAMES:
        if empty:
            monkeypatch.setenv(name, "")
        else:
            monkeypatch.delenv(name, raising=False)
    assert attempt_from_environment() == Attempt("", None, None, None)


def test_every_variable_has_its_field(monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, f"/run/{name}")
    paths = [Path(f"/run/{name}") for name in NAMES[1:]]
    assert attempt_from_environment() == Attempt("/run/RB_ATTEMPT", *paths)
