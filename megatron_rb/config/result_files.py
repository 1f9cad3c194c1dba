"""Files that a command is asked to write its results to: checked before the work, written whole."""

from __future__ import annotations

import os
from pathlib import Path


def writable_file(path: str) -> Path:
    """The file, which may be there already; nothing is made yet.

    Raises:
        ValueError: it cannot be written.
    """
    file = Path(path)
    if file.is_dir():
        raise ValueError(f"{file} is a folder; name a file in it, as {file / 'results'}{file.suffix}")
    _check_folder(file.absolute().parent, file)
    return file


def writable_folder(path: str) -> Path:
    """The folder, which may be there already; nothing is made yet.

    Raises:
        ValueError: nothing can be written there.
    """
    folder = Path(path)
    _check_folder(folder.absolute(), folder)
    return folder


def write_whole(file: Path, text: str) -> None:
    """Write a file whole or not at all, and the folders that it needs."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _check_folder(folder: Path, wanted: Path) -> None:
    there = next(each for each in (folder, *folder.parents) if each.exists())
    if not there.is_dir():
        raise ValueError(f"{wanted} cannot be written: {there} is no folder; name another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{wanted} cannot be written: nothing may be made in {there}; name another place")
