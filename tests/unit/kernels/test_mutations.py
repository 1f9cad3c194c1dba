"""The list of lines that are broken on purpose is up to date and covers every function of every Triton kernel."""

import ast
from pathlib import Path

import pytest

from tests.interpreter.mutations import MUTATIONS, file_of

KERNELS = Path(__file__).parents[3] / "kernels"


@pytest.mark.parametrize(("operator", "line", "broken"), MUTATIONS)
def test_the_line_exists(operator, line, broken):
    assert line != broken
    assert line in file_of(KERNELS / operator, line).read_text()


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*/triton_impl.py")), ids=lambda path: path.parent.name)
def test_every_function_of_a_kernel_is_broken_once(path):
    text = path.read_text()
    lines = [line for operator, line, _ in MUTATIONS if operator == path.parent.name]
    functions = [
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == "triton.jit" for d in node.decorator_list)
    ]
    bodies = {node.name: ast.get_source_segment(text, node) or "" for node in functions}
    assert bodies
    assert [name for name, body in bodies.items() if not any(line in body for line in lines)] == []


def test_every_operator_that_computes_is_broken():
    operators = {path.parent.name for path in KERNELS.glob("*/op.py")}
    # varlen_attention hands on to libraries; its tests compare with every one that can run here.
    assert operators - {operator for operator, _, _ in MUTATIONS} == {"varlen_attention"}
