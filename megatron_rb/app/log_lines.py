"""What a process logs, made visible."""

from __future__ import annotations

import logging


def show_log_lines() -> None:
    """Print what the run logs, such as complete checkpoints, to stderr, once per process."""
    ours = logging.getLogger("megatron_rb")
    if ours.handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False
    # The choice of kernels is one line at the start of the run.
    logging.getLogger("megatron_rb.kernels").setLevel(logging.WARNING)
