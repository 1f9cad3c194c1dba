"""Every command answers `--help` with its usage."""

from pathlib import Path

import pytest

from megatron_rb import cli
from megatron_rb.tools.train import main as train

TOOLS = Path(__file__).parents[3] / "tools"
PARTS = [path.stem[1:].replace("_", " ", 1).replace("_", "-").split() for path in sorted(TOOLS.glob("_*.py"))]
CONVERT = [["convert", way] for way in ("import", "export", "from-megatron", "migrate", "inspect", "verify")]


@pytest.mark.parametrize("words", [*([name] for name in cli.commands()), *PARTS, *CONVERT], ids=" ".join)
def test_help_tells_the_usage(words: list[str], capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([*words, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert left.value.code in (0, None)
    assert said.startswith(f"usage: rb {' '.join(words)} [-h]")


def test_train_refuses_settings_beside_a_whole_config():
    with pytest.raises(ValueError, match="--config run/config.yaml holds every setting; leave out optimizer.lr=1"):
        train(["--config", "run/config.yaml", "optimizer.lr=1"])
