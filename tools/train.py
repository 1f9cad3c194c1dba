"""Be one process of a training run; srun, torchrun or `rb launch` start one per device."""

from __future__ import annotations

from megatron_rb.app.main import main as train


def main(argv: list[str]) -> int:
    """Train with the given `key=value` settings; rank and world size come from the environment."""
    return train(argv)
