"""How a command ends when a process that it has started has failed."""

import pytest

from megatron_rb import cli
from megatron_rb.config.commands import Command
from megatron_rb.config.failures import WRONG_INPUT, ProcessFailed


def ended(monkeypatch, capsys, code: int) -> tuple[int, str]:
    def run(argv: list[str]) -> int:
        raise ProcessFailed("a process of the test", code)

    monkeypatch.setitem(cli.COMMANDS, "parity", Command("", run))
    return cli.main(["parity"]), capsys.readouterr().err


def test_wrong_input_that_a_worker_has_told_is_not_told_again(monkeypatch, capsys):
    assert ended(monkeypatch, capsys, WRONG_INPUT) == (WRONG_INPUT, "")


@pytest.mark.parametrize("code", [1, 65, 137])
def test_any_other_end_of_a_worker_is_one_sentence_and_its_code(monkeypatch, capsys, code: int):
    found, said = ended(monkeypatch, capsys, code)
    assert found == code
    assert said.startswith(f"rb: a process of the test ended with exit code {code}; its output stands above\n")
