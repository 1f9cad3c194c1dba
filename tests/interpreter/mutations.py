"""Breaks one line of a kernel at a time in a copy of the sources; the kernel's test must then fail.

`python -m tests.interpreter.mutations` where triton is installed; exit code 1 when a broken line goes unnoticed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
MUTATIONS = (
    ("mrope", "out_first = first * cos - DIRECTION", "out_first = first * cos + DIRECTION"),
    ("mrope", "second = second * scale * tl.load(weight + HALF", "second = second * scale * tl.load(weight"),
    ("mrope", "(scale * (g_first - first * along)", "(scale * (g_first)"),
    ("mrope", "q_second += second", "q_second = second"),
    ("window_attention", "sign = tl.where(low, -1.0, 1.0)", "sign = tl.where(low, 1.0, -1.0)"),
    ("window_attention", "scores = tl.where(column < count, scores", "scores = tl.where(column < BLOCK, scores"),
    ("window_attention", "ds = narrow(p * (dp - tl.sum(p * dp, 1)[:, None])", "ds = narrow(p * (dp"),
    ("window_attention", "gradient = dot(d_scores, own) * c - dot", "gradient = dot(d_scores, own) * c + dot"),
    ("window_attention", "ds_turned = tl.trans(ds)", "ds_turned = ds"),
    ("dynamic_padding", "taken = origin >= 0", "taken = origin >= -1"),
    ("dynamic_padding", "value = tl.where(taken, value, kept)", "value = kept"),
    ("dynamic_padding", 'move_rows(grad, grad, index, "mask")', "grad"),
)
"""Operator, line, broken line. A line is looked for in the operator's Triton file, then in its op.py."""


def main() -> int:
    unnoticed = 0
    for operator, line, broken in MUTATIONS:
        noticed = _is_noticed(operator, line, broken)
        unnoticed += not noticed
        print(f"{'noticed' if noticed else 'NOT NOTICED':<12}{operator}: {broken}", flush=True)
    return 1 if unnoticed else 0


def _is_noticed(operator: str, line: str, broken: str) -> bool:
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        for name in ("kernels", "megatron_rb", "tests/interpreter"):
            shutil.copytree(REPOSITORY / name, Path(folder) / name, symlinks=True)
        shutil.copy(REPOSITORY / "pyproject.toml", folder)
        _break(Path(folder) / "kernels" / operator, line, broken)
        test = f"tests/interpreter/test_{operator}.py"
        environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", test, "-x", "-p", "no:cacheprovider", "--show-capture=no"]
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        # 1 = a test failed; anything else says that the tests did not run.
        if result.returncode not in (0, 1):
            raise RuntimeError(f"{test} did not run:\n{result.stdout[-3000:]}{result.stderr[-1000:]}")
        return result.returncode == 1


def _break(folder: Path, line: str, broken: str) -> None:
    for path in (folder / "triton_impl.py", folder / "op.py"):
        text = path.read_text(encoding="utf-8")
        if line in text:
            path.write_text(text.replace(line, broken), encoding="utf-8")
            return
    raise RuntimeError(f"no file in {folder.name} has the line '{line}'; bring the list of mutations up to date")


if __name__ == "__main__":
    sys.exit(main())
