"""The one entry of worker processes: `python -m megatron_rb.app.worker module:function FOLDER`.

A function whose first argument is `session` is called with an open one, the config and the folder; the session is that
of the folder's `config.yaml`. Any other is called with the folder. Commands start it once per process; srun and
torchrun can start it on such a folder too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_rb.app.log_lines import show_log_lines
from megatron_rb.app.session import adapt_megatron, open_session
from megatron_rb.config.compose import CONFIG_FILE, config_from_file
from megatron_rb.config.failures import complain, exit_code_of
from megatron_rb.parallel.world import leave_world


def main(argv: Sequence[str]) -> int:
    """Run a function on a folder; wrong input is one sentence and its exit code, `--debug` shows its traceback."""
    words = [word for word in argv if word != "--debug"]
    try:
        if len(words) != 2:
            raise ValueError(f"a worker is told module:function and a folder, got: {' '.join(words) or 'nothing'}")
        run(words[0], Path(words[1]))
    except Exception as error:
        code = exit_code_of(error)
        if "--debug" in argv or code is None:
            raise
        complain(error, place=words[-1] if words else "")
        leave_at_once(code)
    return 0


def run(target: str, folder: Path) -> None:
    """Call the function that `module:function` names, and leave the world that it has joined."""
    show_log_lines()
    file = folder / CONFIG_FILE
    config = config_from_file(file) if file.is_file() else None
    if config is not None:
        adapt_megatron(config.platform.name)  # before the module of the function imports megatron-core
    function = function_of(target)
    if takes_session(function):
        if config is None:
            raise ValueError(f"{target} needs the settings of its session: there is no {file}")
        function(open_session(config), config, folder)
    else:
        function(folder)
    if dist.is_initialized():
        leave_world()


def function_of(target: str) -> Callable[..., Any]:
    """The function that `module:function` names.

    Raises:
        ValueError: there is no such module or function.
    """
    module, _, name = target.partition(":")
    try:
        function = getattr(import_module(module), name, None) if name else None
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there and lacks another one
        function = None
    if function is None:
        raise ValueError(f"'{target}' names no function; write module:function")
    return function


def takes_session(function: Callable[..., Any]) -> bool:
    return next(iter(signature(function).parameters), "") == "session"


def leave_at_once(code: int) -> None:
    """End this process. A normal exit would wait for ranks that sit in a collective."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
