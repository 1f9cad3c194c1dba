"""Which checkpoints a run does not continue from, said before anything is loaded."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rb.app.assemble import _resume
from megatron_rb.config.schema import CheckpointConfig, Config


def holding(step: int) -> Any:
    """Stands for the checkpoints of a run that has made so many steps."""
    return SimpleNamespace(
        folder=Path("runs/my/checkpoints"),
        take_over=lambda: None,
        latest=lambda: step,
        load=lambda state: SimpleNamespace(step=step),
    )


def test_fewer_steps_than_the_run_has_made_are_refused():
    words = (
        "holds a checkpoint of step 8 and the settings ask for 5 steps .*; ask for 8 or more, or choose another run_dir"
    )
    with pytest.raises(ValueError, match=words):
        _resume(Config(), holding(8), None, train_steps=5)  # type: ignore[arg-type]


@pytest.mark.parametrize("train_steps", [8, 9])
def test_a_run_that_has_finished_may_be_asked_for_again_or_go_on(train_steps: int):
    assert _resume(Config(), holding(8), None, train_steps) == 8  # type: ignore[arg-type]


def test_a_run_that_shall_not_be_continued_is_not():
    config = Config(checkpoint=CheckpointConfig(resume=False))
    with pytest.raises(ValueError, match="checkpoint.resume is false"):
        _resume(config, holding(8), None, train_steps=9)  # type: ignore[arg-type]
