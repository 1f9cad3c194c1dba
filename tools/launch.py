"""Start a training run on this machine, e.g. `rb launch experiment=demo`."""

from __future__ import annotations

import argparse

from megatron_rb.config.compose import load_config
from megatron_rb.config.derive import derive
from megatron_rb.launch.main import dry_run, launch
from megatron_rb.models.robobrain.config import load_shape


def main(argv: list[str]) -> int:
    """Check the settings, start all processes, wait for them."""
    parser = argparse.ArgumentParser(prog="rb launch", description=__doc__)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="e.g. experiment=demo parallel.tp_size=2")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and start nothing")
    options = parser.parse_intermixed_args(argv)
    config = load_config(options.settings)
    derived = derive(config, load_shape(config.model.hf_path))
    return (dry_run if options.dry_run else launch)(config, derived, options.settings)
