"""Places for results, checked before the work and written whole."""

import os

import pytest

from megatron_rb.config.result_files import writable_file, writable_folder, write_whole


def test_a_file_in_a_folder_to_be_is_allowed_and_nothing_is_made_yet(tmp_path):
    file = writable_file(str(tmp_path / "new" / "out.json"))
    assert not file.parent.exists()
    write_whole(file, "text")
    assert file.read_text() == "text" and os.listdir(file.parent) == ["out.json"]


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"is a folder; name a file in it"):
        writable_file(str(tmp_path))


@pytest.mark.parametrize("check", [writable_file, writable_folder])
def test_a_file_on_the_way_is_named(check, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be written: .*file is no folder; name another place"):
        check(str(tmp_path / "file" / "out"))


def test_a_folder_where_nothing_may_be_made_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match=f"nothing may be made in {tmp_path}; name another place"):
        writable_file(str(tmp_path / "out.json"))


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path):
    file = tmp_path / "out.json"
    write_whole(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(file, "new \ud800")
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["out.json"]
