"""Words of `rb bench device` that are refused before a part runs."""

import pytest

from megatron_rb import cli


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--minutes", "nan"], "--minutes is nan; give a number above 0"),
        (["--minutes", "inf"], "--minutes is inf; give a number above 0"),
        (["--out", "file/folder"], "file/folder cannot be written:"),
    ],
)
def test_wrong_words_are_one_sentence(words, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert cli.main(["bench", "device", "--dry", "--parts", "smoke", *words]) == 2
    assert sentence in capsys.readouterr().err.replace("\n", " ")


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_rehearsed(tmp_path, capsys):
    assert cli.main(["bench", "device", "--rehearse", str(tmp_path)]) == 2
    assert "is a folder; name a file in it" in capsys.readouterr().err.replace("\n", " ")
