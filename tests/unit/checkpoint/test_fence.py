"""Who may write the checkpoints of a run."""

import pytest

from megatron_rb.checkpoint.fence import Fence, Fenced


def test_owner_may_write_and_an_earlier_attempt_may_not(tmp_path):
    file = tmp_path / "attempt"
    first, second = Fence("run/1-a", file), Fence("run/2-b", file)
    file.write_text("run/1-a")
    first.check()
    file.write_text("run/2-b")
    second.check()
    with pytest.raises(Fenced, match="attempt run/1-a may not write checkpoints any more: attempt run/2-b"):
        first.check()


def test_attempt_that_was_ended_may_not_write(tmp_path):
    (tmp_path / "attempt").write_text("run/1-a/ended")
    with pytest.raises(Fenced):
        Fence("run/1-a", tmp_path / "attempt").check()
