"""`run.json`: what happened in a run, and how much of its time counted."""

import json
from pathlib import Path

import pytest

from megatron_rb.launch.failure import FailureKind
from megatron_rb.launch.record import AttemptNote, RunRecord, effective_time_ratio, load_record, running_seconds


def record(kind: str) -> RunRecord:
    note = AttemptNote(3, "r/3", ["a"], 0.0, 0, outcome="failed", kind=kind)  # type: ignore[arg-type]
    return RunRecord("r", "r", "local", attempts=[note])


@pytest.mark.parametrize("kind", ["", "configuration", "numbers", "rank", "hang", "node", "start"])
def test_kinds_of_failure_are_plain_words_in_the_file(kind: str, tmp_path: Path):
    record(FailureKind(kind) if kind else "").save(tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["attempts"][0]["kind"] == kind
    found = load_record(tmp_path)
    assert found is not None and found.attempts[0].kind == kind
    assert isinstance(found.attempts[0].kind, FailureKind) == bool(kind)


def test_unknown_kind_of_failure_is_one_sentence_with_the_file_and_the_attempt(tmp_path: Path):
    record("meteor").save(tmp_path)
    with pytest.raises(
        ValueError, match=r"run\.json: attempt 3 failed by 'meteor', which is no kind of failure; there"
    ):
        load_record(tmp_path)


def test_a_note_of_an_earlier_version_without_a_kind_is_read(tmp_path: Path):
    record("").save(tmp_path)
    content = json.loads((tmp_path / "run.json").read_text())
    del content["attempts"][0]["kind"]
    (tmp_path / "run.json").write_text(json.dumps(content))
    found = load_record(tmp_path)
    assert found is not None and found.attempts[0].kind == ""


def test_time_stopped_on_purpose_is_not_lost():
    notes = [
        AttemptNote(1, "a", [], started=0.0, resumed_from=0, ended=10.0, outcome="stopped"),
        AttemptNote(2, "b", [], started=1000.0, resumed_from=5, ended=1010.0, outcome="failed"),
        AttemptNote(3, "c", [], started=1015.0, resumed_from=5),
    ]
    assert running_seconds(notes, until=1020.0) == 30.0
    assert effective_time_ratio([12.0, 3.0], 30.0) == 0.5
