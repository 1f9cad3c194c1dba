"""Every random number of a test comes from a seed, so that a failure can be seen again."""

import ast
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.architecture.source_tree import REPOSITORY

SEEDED_BY_ARGUMENT = {"default_rng", "RandomState", "Random", "SeedSequence", "seed"}
"""They take the seed as their first argument and draw one of the system without it."""


def unseeded(tree: ast.AST) -> list[str]:
    """Calls that make a generator without a seed; the global generators are seeded before each test."""
    seeded = {id(call) for call in _seeded_generators(tree)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and id(node) not in seeded]
    return [f"{ast.unparse(call)} in line {call.lineno}" for call in calls if _draws_its_seed(call)]


def _draws_its_seed(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    if name.rpartition(".")[2] in SEEDED_BY_ARGUMENT:
        values = [*call.args, *(keyword.value for keyword in call.keywords)]
        return not values or ast.unparse(values[0]) == "None"
    return name in ("torch.Generator", "random.SystemRandom")


def _seeded_generators(tree: ast.AST) -> Iterator[ast.expr]:
    """`torch.Generator(...)` of which `manual_seed` or `set_state` is called at once."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("manual_seed", "set_state"):
            yield node.value


@pytest.mark.parametrize(
    "line",
    [
        "np.random.default_rng()",
        "default_rng(None)",
        "torch.Generator()",
        "torch.Generator(device='cpu')",
        "random.Random()",
        "np.random.RandomState()",
        "random.seed()",
        "random.SystemRandom()",
        "np.random.SeedSequence(entropy=None)",
    ],
)
def test_a_generator_without_a_seed_is_found(line):
    assert unseeded(ast.parse(line)) == [f"{line} in line 1"]


@pytest.mark.parametrize(
    "line", ["np.random.default_rng(3)", "torch.Generator().manual_seed(3)", "random.Random(seed)", "random.random()"]
)
def test_a_generator_with_a_seed_is_not_found(line):
    assert unseeded(ast.parse(line)) == []


def test_no_test_makes_a_generator_without_a_seed():
    files = sorted((REPOSITORY / "tests").rglob("*.py"))
    found = {path.name: unseeded(ast.parse(path.read_text(encoding="utf-8"))) for path in files}
    assert {name: calls for name, calls in found.items() if calls} == {}


@pytest.mark.parametrize("number", range(2))
def test_every_test_begins_with_the_same_states(number: int):
    drawn = random.random(), np.random.rand(), torch.rand(1).item()
    generator = torch.Generator().manual_seed(0)
    assert drawn == (
        random.Random(0).random(),
        np.random.RandomState(0).rand(),
        torch.rand(1, generator=generator).item(),
    )


@pytest.fixture(scope="module", params=range(2))
def shared(request):
    return random.random(), np.random.rand(), torch.rand(1).item()


SHARED = []


def test_fixtures_of_many_tests_begin_with_the_same_states(shared):
    SHARED.append(shared)
    assert len(set(SHARED)) == 1 and SHARED[0][0] != random.Random(0).random()
