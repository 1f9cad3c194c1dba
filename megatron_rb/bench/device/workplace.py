"""Where the parts of a first look at a device work: its folder, its commands, and the time that is left."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megatron_rb.config.child_processes import follow_parent, held_back

LAST_LINES = 3
"""Of the log of a command that failed."""


class PartFailed(Exception):
    """A command of a part ended with an error; the text is its last words."""


class OutOfTime(Exception):
    """A part took longer than it may."""


class Skipped(Exception):
    """A part has nothing to do here; the text says why."""


def checkout() -> Path | None:
    """The checkout that this package runs from; None where it is installed without one."""
    folder = Path(__file__).resolve().parents[3]
    return folder if (folder / "tests/gpu").is_dir() else None


@dataclass
class Workplace:
    """What a part is given.

    Args:
        folder: of all results.
        scratch: of models and checkpoints, which are removed in the end.
        on_device: False = the dry form, which takes small models on the CPU.
        device: of conf/device, for the rehearsed figures.
        memory: bytes of the device; 0 = unknown.
        repository: the checkout with tests and examples; None = there is none.
    """

    folder: Path
    scratch: Path
    on_device: bool
    device: str
    memory: int
    repository: Path | None
    part: str = ""
    deadline: float = 0.0
    """Of the part that runs, by `time.monotonic`."""

    def rb(self, *words: object) -> str:
        """Run one `rb` command, its output going to the log of the part; returns its output.

        Raises:
            PartFailed: it ended with an error.
            OutOfTime: the part has no time left; the command was ended.
        """
        return self.run(sys.executable, "-m", "megatron_rb.cli", *words)

    def run(self, *words: object) -> str:
        """As `rb`, for any command."""
        command = [str(word) for word in words]
        log = self.folder / "logs" / f"{self.part}.log"
        log.parent.mkdir(exist_ok=True)
        before = log.stat().st_size if log.exists() else 0
        with log.open("ab") as out:
            out.write(f"$ {shlex.join(command)}\n".encode())
            out.flush()
            code = self._wait(command, out)
        said = log.read_bytes()[before:].decode(errors="replace")
        if code:
            words_of = [line for line in said.splitlines()[1:] if line.strip()]
            raise PartFailed(f"ended with {code}: {' / '.join(words_of[-LAST_LINES:])}")
        return said

    def _wait(self, command: list[str], out: BinaryIO) -> int:
        """The exit code of a command, which does not outlive the part."""
        process: subprocess.Popen[bytes] | None = None
        try:
            with held_back():
                process = subprocess.Popen(
                    command, stdout=out, stderr=out, start_new_session=True, preexec_fn=follow_parent()
                )
            return process.wait(max(self.deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            raise OutOfTime from None
        finally:
            if process is not None and process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
