"""Exclusive use of a folder by one process, as far as the file system can promise it."""

from __future__ import annotations

import errno
import fcntl
import logging
from pathlib import Path
from typing import IO

WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What flock answers on file systems that have none: Lustre mounted without `-o flock`, some NFS and FUSE mounts."""
logger = logging.getLogger(__name__)


def lock_exclusively(file: IO[str], folder: Path) -> None:
    """Hold an open file until it is closed; where the file system has no locks, say so and go on.

    Args:
        folder: what the lock protects, for the note.

    Raises:
        BlockingIOError: another process holds it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        logger.warning(
            "the file system of %s has no file locks (%s): nothing keeps a second process from using this folder at "
            "the same time; start one only",
            folder,
            error.strerror,
        )
