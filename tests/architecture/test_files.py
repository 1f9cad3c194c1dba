"""Names and places of files, and what every file keeps to."""

import ast
import os
import subprocess
import sys

import pytest
from setuptools import find_namespace_packages

from tests.architecture.source_tree import BESIDE, REPOSITORY, Source, sources

TOOLS = [source for source in sources() if source.is_in("tools")]


def test_nobody_writes_a_drawer_module():
    names = {"utils", "helpers", "common", "misc"}
    files = [source.path for source in sources()] + list((REPOSITORY / "tests").rglob("*.py"))
    assert [path for path in files if path.stem in names] == []


def test_nobody_uses_global():
    users = [source.room for source in sources() for node in ast.walk(source.tree) if isinstance(node, ast.Global)]
    assert users == []


def test_every_module_opens_with_a_sentence():
    silent = [source.room for source in sources() if source.tree.body and not ast.get_docstring(source.tree)]
    assert silent == []


@pytest.mark.parametrize("folder", ["tools", "launch"])
def test_no_file_hides_the_standard_library(folder: str):
    stems = {path.stem for path in (REPOSITORY / folder).iterdir()}
    assert stems & set(sys.stdlib_module_names) == set()


@pytest.mark.parametrize("tool", TOOLS, ids=lambda source: source.room)
def test_tool_is_a_command(tool: Source):
    mains = [node for node in tool.tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    assert len(mains) == 1
    assert ast.unparse(mains[0].args) == "argv: list[str]"
    assert mains[0].returns is not None and ast.unparse(mains[0].returns) == "int"


@pytest.mark.parametrize("name", BESIDE)
def test_sub_package_is_a_relative_link(name: str):
    assert os.readlink(REPOSITORY / "megatron_rb" / name) == f"../{name}"
    assert (REPOSITORY / name / "__init__.py").exists() == (name == "conf")


def test_links_in_git_are_relative():
    listing = subprocess.run(["git", "ls-files", "-s"], cwd=REPOSITORY, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    links = [line.split("\t")[1] for line in listing.stdout.splitlines() if line.startswith("120000")]
    assert len(links) >= len(BESIDE)
    assert [link for link in links if os.path.isabs(os.readlink(REPOSITORY / link))] == []


def test_packages_are_found_through_the_links():
    found = set(find_namespace_packages(str(REPOSITORY), include=["megatron_rb", "megatron_rb.*"]))
    assert {f"megatron_rb.{name}" for name in BESIDE} <= found
    assert found.isdisjoint(BESIDE)
    wanted = {source.module.rpartition(".")[0] for source in sources() if source.path.name != "__init__.py"}
    assert wanted <= found


def test_nothing_needs_a_newer_python_than_the_oldest_that_is_supported():
    """Moore Threads' images have Python 3.10. mypy checks the rest of the standard library for it."""
    assert 'python_requires=">=3.10"' in (REPOSITORY / "setup.py").read_text()
    later = (
        "tomllib",
        "enum.StrEnum",
        "typing.Self",
        "typing.assert_never",
        "datetime.UTC",
        "contextlib.chdir",
        "hashlib.file_digest",
        "itertools.batched",
        "asyncio.TaskGroup",
    )
    assert [source.room for source in sources() if source.uses(*later)] == []
    for source in sources():
        ast.parse(source.path.read_text(encoding="utf-8"), str(source.path), feature_version=(3, 10))
