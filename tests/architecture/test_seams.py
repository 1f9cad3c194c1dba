"""Who may ask what: each kind of knowledge has one place in the code."""

import ast
import re
from collections import defaultdict

import pytest

from megatron_rb.config.rules import CHOICES
from megatron_rb.config.settings_page import sections
from megatron_rb.shapes.families import FAMILIES
from tests.architecture.source_tree import sources

WEIGHT_TABLES = ("checkpoint.hf.table", "checkpoint.legacy", "checkpoint.megatron_dist")


def test_families_are_named_in_their_records_and_the_weight_tables_only():
    named = [
        f"{source.room}:{node.lineno}"
        for source in sources()
        if not source.is_in("shapes", *WEIGHT_TABLES)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Constant) and node.value in FAMILIES
    ]
    assert named == []


def test_nobody_compares_families():
    def is_family(node: ast.AST) -> bool:
        return ast.unparse(node).rpartition(".")[2] in ("family", "traits", "model_type")

    compared = [
        f"{source.room}:{node.lineno}"
        for source in sources()
        if not source.is_in("shapes", *WEIGHT_TABLES)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Compare)
        and any(is_family(side) for side in (node.left, *node.comparators))
        and ast.unparse(node.comparators[0]) != "FAMILIES"
    ]
    assert compared == []


def test_a_class_name_stands_once_in_the_package():
    rooms = defaultdict(list)
    for source in sources():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ClassDef):
                rooms[node.name].append(source.room)
    assert {name: where for name, where in rooms.items() if len(where) > 1} == {}
    assert len(rooms) > 300


@pytest.mark.parametrize("key", CHOICES)
def test_choices_of_a_setting_are_those_that_its_documentation_tells(key: str):
    """A backquoted word without quotes or dots is a choice."""
    (meaning,) = [line.meaning for section in sections() for line in section.lines if line.key == key]
    assert set(re.findall(r"`([a-z]\w*)`", meaning)) == set(CHOICES[key])
