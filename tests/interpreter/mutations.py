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
TESTS = {
    "linear_cross_entropy": "tests/unit/kernels/test_linear_cross_entropy.py",
    "rms_norm": "tests/unit/kernels/test_norm_and_activation.py",
    "swiglu": "tests/unit/kernels/test_norm_and_activation.py",
}
"""Where an operator without a Triton kernel of its own is tested; the others in Triton's interpreter."""
MUTATIONS = (
    ("mrope", "out_first = first * cos - DIRECTION", "out_first = first * cos + DIRECTION"),
    ("mrope", "tl.where(low, -DIRECTION, DIRECTION)", "DIRECTION"),
    ("mrope", "partner = tl.where(low, column + HALF", "partner = tl.where(low, column + HALF - 1"),
    ("mrope", "of_q = q + token * q_token", "of_q = q + 0 * q_token"),
    ("mrope", "tl.load(address + HALF, mask", "tl.load(address, mask"),
    ("mrope", "tl.load(k_weight + OFFSET", "tl.load(q_weight + OFFSET"),
    ("mrope", "first = first * scale * _weights(", "first = first * _weights("),
    ("mrope", "narrow(scale * (g_first - first * along)", "narrow(scale * (g_first)"),
    ("mrope", "weight_second += g_second * second", "weight_second = g_second * second"),
    ("mrope", "tl.sum(tl.where(is_q, 0.0, weight_first), 0)", "tl.sum(weight_first, 0)"),
    ("window_attention", "sign = tl.where(low, -1.0, 1.0)", "sign = tl.where(low, 1.0, -1.0)"),
    ("window_attention", "rows * row_stride + column, live, other", "rows * row_stride + column // 2 * 2, live, other"),
    ("window_attention", "other=0.0), sign * tl.load(", "other=0.0), tl.load("),
    ("window_attention", "== partner, 1.0, 0.0)", "== partner, 0.5, 0.0)"),
    ("window_attention", "narrow(own * c + other * s", "narrow(own * c - other * s"),
    ("window_attention", "scores = tl.where(column < count, scores", "scores = tl.where(column < BLOCK, scores"),
    ("window_attention", "p = narrow(_probabilities(scores * scale", "p = narrow(_probabilities(scores"),
    ("window_attention", "ds = narrow(p * (dp - tl.sum(p * dp, 1)[:, None])", "ds = narrow(p * (dp"),
    ("window_attention", "gradient = dot(d_scores, own) * c - dot", "gradient = dot(d_scores, own) * c + dot"),
    ("window_attention", "ds_turned = tl.trans(ds)", "ds_turned = ds"),
    ("dynamic_padding", "taken = origin >= 0", "taken = origin >= -1"),
    ("dynamic_padding", "value = tl.where(taken, value, kept)", "value = kept"),
    ("dynamic_padding", 'move_rows(grad, grad, index, "mask")', "grad"),
    ("linear_cross_entropy", "x.mul_((weights / total)", "x.mul_((1 / total)"),
    ("linear_cross_entropy", "x.sub_(shard.maximum(x.amax(1)).unsqueeze(1))", "x.sub_(0)"),
    ("linear_cross_entropy", "valid = labels != IGNORED", "valid = labels >= IGNORED"),
    ("linear_cross_entropy", "total.addmm_(grad.t(), hidden)", "total.copy_(grad.t() @ hidden)"),
    ("linear_cross_entropy", "d_hidden * grad.to(d_hidden.dtype)", "d_hidden * 1"),
    ("rms_norm", "x.float(), weight.shape, None, eps)", "x.float(), weight.shape, None, 1.0)"),
    ("swiglu", "d_up.mul_(grad)", "d_up.mul_(1)"),
)
"""Operator, line, broken line. A line is looked for in the files of the operator that are not its definition."""


def main() -> int:
    for operator in dict.fromkeys(operator for operator, _, _ in MUTATIONS):
        if not _passes(operator, "", ""):
            raise RuntimeError(f"the tests of {operator} fail with nothing broken")
    unnoticed = 0
    for operator, line, broken in MUTATIONS:
        noticed = not _passes(operator, line, broken)
        unnoticed += not noticed
        print(f"{'noticed' if noticed else 'NOT NOTICED':<12}{operator}: {broken}", flush=True)
    return 1 if unnoticed else 0


def _passes(operator: str, line: str, broken: str) -> bool:
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        for name in ("kernels", "megatron_rb", "tests/interpreter", "tests/unit/kernels"):
            shutil.copytree(REPOSITORY / name, Path(folder) / name, symlinks=True)
        shutil.copy(REPOSITORY / "pyproject.toml", folder)
        if line:
            _break(Path(folder) / "kernels" / operator, line, broken)
        test = TESTS.get(operator, f"tests/interpreter/test_{operator}.py")
        path = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])
        interpret = "0" if operator in TESTS else "1"
        environment = os.environ | {"TRITON_INTERPRET": interpret, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", test, "-x", "-p", "no:cacheprovider", "--show-capture=no"]
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        # 1 = a test failed; anything else says that the tests did not run.
        if result.returncode not in (0, 1):
            raise RuntimeError(f"{test} did not run:\n{result.stdout[-3000:]}{result.stderr[-1000:]}")
        return result.returncode == 0


def _break(folder: Path, line: str, broken: str) -> None:
    path = file_of(folder, line)
    path.write_text(path.read_text(encoding="utf-8").replace(line, broken), encoding="utf-8")


def file_of(folder: Path, line: str) -> Path:
    """The file of an operator that has a line.

    Raises:
        RuntimeError: none has it.
    """
    for path in sorted(folder.glob("*.py")):
        if path.name != "reference.py" and line in path.read_text(encoding="utf-8"):
            return path
    raise RuntimeError(f"no file in {folder.name} has the line '{line}'; bring the list of mutations up to date")


if __name__ == "__main__":
    sys.exit(main())
