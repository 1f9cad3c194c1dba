"""Errors that are told in a sentence, and their exit codes."""

import errno

import pytest

from megatron_rb.config.failures import exit_code_of, sentence, without_room

FULL = OSError(errno.ENOSPC, "No space left on device")


def broken_off() -> Exception:
    """What another part of a program raises while the error of a full disk is handled."""
    try:
        try:
            raise FULL
        finally:
            raise RuntimeError("the checkpoint was not written")
    except RuntimeError as error:
        return error


@pytest.mark.parametrize("error", [FULL, OSError(errno.EDQUOT, "Disk quota exceeded"), broken_off()])
def test_full_disk_has_an_exit_code_of_its_own(error: Exception):
    assert exit_code_of(error) == 74


def test_full_disk_behind_another_error_is_told_with_the_place():
    words = "runs/a cannot be written: No space left on device; make room there, and the same command goes on"
    assert sentence(broken_off(), "runs/a") == words


def test_file_that_is_named_wins_over_the_place():
    error = OSError(errno.ENOSPC, "No space left on device", "runs/a/run.json")
    assert sentence(error, "runs/a").startswith("runs/a/run.json cannot be written: ")


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied"), RuntimeError("x")])
def test_another_error_is_none_of_a_full_disk(error: Exception):
    assert without_room(error) is None and exit_code_of(error) is None
    assert sentence(error) == str(error)
