"""The limit of open files and sockets of this process."""

from __future__ import annotations

import contextlib
import resource


def raise_open_files() -> int:
    """Allow this process, and what it starts, as many open files as the system lets it; returns how many."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # a limit above what the kernel allows by now
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
