"""Jobs whose ranks only note their environment, for tests of what reaches them."""

from __future__ import annotations

import sys

from megatron_rb.bench.launch.cluster import wait_for
from megatron_rb.bench.launch.runs import TinyRun, model_settings

NOTE_ENVIRONMENT = f"""#!/bin/bash
case "$2" in megatron_rb.launch.*) exec {sys.executable} "$@" ;; esac
env -0 >"$(dirname "$0")/rank_$RANK.env"
"""


class NotedRun(TinyRun):
    """A run whose ranks write their environment beside the run folder and leave."""

    @property
    def noting(self) -> list[str]:
        """Settings by which the ranks do so."""
        script = self.run_dir.parent / "note_environment"
        script.write_text(NOTE_ENVIRONMENT)
        script.chmod(0o755)
        return [f"cluster.python={script}", f"cluster.host_python={sys.executable}", "cluster.max_retries=0"]

    @property
    def command(self) -> list[str]:
        """The command line that starts the run, for another program to call."""
        settings = [*model_settings(self.inputs), *self.settings, *self.noting, f"run_dir={self.run_dir}"]
        return [sys.executable, "-m", "megatron_rb.cli", "launch", *settings]

    def environment(self, rank: int = 0) -> dict[str, str]:
        """What a rank has noted."""
        words = (self.run_dir.parent / f"rank_{rank}.env").read_text().split("\0")
        return dict(word.split("=", 1) for word in words if "=" in word)

    def note(self, *words: str) -> NotedRun:
        """Start the run and wait until it has ended."""
        done = self.rb(*self.noting, *words)
        assert done.returncode == 0, done.stdout + done.stderr
        return self.wait_noted()

    def wait_noted(self, attempt: int = 1) -> NotedRun:
        """Wait until the ranks of an attempt have left."""
        ended = lambda: len(self.record.attempts) >= attempt and self.record.state == "COMPLETED"  # noqa: E731
        wait_for(ended, 40, self.story)
        return self
