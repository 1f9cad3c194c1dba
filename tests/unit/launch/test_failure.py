"""What exit codes say about a failure."""

import pytest

from megatron_rb.launch.failure import FailureKind, describe_exit, kind_of_exit


@pytest.mark.parametrize(
    ("code", "kind"),
    [(1, "rank"), (137, "rank"), (2, "configuration"), (78, "configuration"), (65, "numbers"), (75, "node")],
)
def test_exit_codes_have_classes(code: int, kind: str):
    assert kind_of_exit(code) is FailureKind(kind)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (3, "failed with exit code 3"),
        (139, "was killed by SIGSEGV"),
        (137, "was killed by SIGKILL (often: the machine ran out of memory)"),
        (74, "found no room on the disk (exit code 74)"),
        (255, "failed with exit code 255"),
    ],
)
def test_exit_codes_are_told_as_a_shell_has_them(code: int, words: str):
    assert describe_exit(code) == words
