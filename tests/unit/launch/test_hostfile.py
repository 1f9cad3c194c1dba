"""Files that name the machines of a run."""

import pytest

from megatron_rb.launch.hostfile import read_hosts
from megatron_rb.launch.job import Host


def test_host_file_of_flagscale_is_read(tmp_path):
    (tmp_path / "hosts").write_text("# machines\n10.0.0.1 slots=8 type=A800\n\nmtt-1 slots=8 type=MTT # new\nc\n")
    assert read_hosts(tmp_path / "hosts") == (Host("10.0.0.1", 8, "A800"), Host("mtt-1", 8, "MTT"), Host("c"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a slot=8", r"line 1: 'slot=8' is not known"),
        ("a slots=x", r"slots must be a whole number, got 'x'"),
        ("a\na", r"names a more than once"),
        ("# none", r"names no host"),
    ],
)
def test_bad_host_file_is_one_sentence(tmp_path, text: str, words: str):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_hosts(tmp_path / "hosts")
