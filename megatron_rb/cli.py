"""`rb`: finds the subcommand's file in tools/ and runs its `main`; imports nothing heavy itself."""

from __future__ import annotations

import ast
import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_rb.config.failures import complain, exit_code_of

TOOLS = Path(__file__).parent / "tools"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `rb <command> <arguments>`; wrong input is one sentence and exit code 2, `--debug` shows its traceback.

    A ValueError of another package is no wrong input that was foreseen: it keeps its traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [word for word in arguments if word != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    try:
        return _run(arguments[0], arguments[1:])
    except Exception as error:
        code = exit_code_of(error)
        if debug or code is None:
            raise
        complain(error)
        return code


def commands() -> dict[str, str]:
    """Every subcommand with the first line of its docstring."""
    files = sorted(path for path in TOOLS.glob("*.py") if not path.stem.startswith("_"))
    return {path.stem.replace("_", "-"): _first_line(path) for path in files}


def _run(name: str, arguments: list[str]) -> int:
    known = commands()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(known)}"
        raise ValueError(f"rb has no command '{name}'{hint}")
    module = importlib.import_module(f"megatron_rb.tools.{name.replace('-', '_')}")
    return int(module.main(arguments) or 0)


def _first_line(path: Path) -> str:
    # Parsed, not imported: the overview must not wait for torch.
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n", 1)[0]


def _overview() -> str:
    known = commands()
    width = max(map(len, known), default=0)
    lines = [f"  {name:<{width}}  {text}" for name, text in known.items()]
    return "\n".join(
        ["usage: rb [--debug] <command> [arguments]", "", *lines, "", "`rb <command> --help` tells more about one."]
    )


if __name__ == "__main__":
    sys.exit(main())
