"""Be one process of a training run; srun, torchrun or `rb launch` start one per device."""

from __future__ import annotations

import argparse

from megatron_rb.app.main import main as train


def main(argv: list[str]) -> int:
    """Train with the given `key=value` settings; rank and world size come from the environment."""
    options = _parser().parse_args(argv)
    if options.config and options.settings:
        raise ValueError(f"--config {options.config} holds every setting; leave out {' '.join(options.settings)}")
    return train(["--config", options.config] if options.config else options.settings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rb train", description=__doc__)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of the run, as for rb launch")
    parser.add_argument(
        "--config", default="", metavar="FILE", help="config.yaml of a run folder, in place of settings"
    )
    return parser
