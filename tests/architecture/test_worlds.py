"""One way into a world: who adapts megatron-core, who builds groups, how worker processes start."""

import ast
import re
from importlib import import_module
from inspect import signature

import pytest

from megatron_rb.launch.job import WORKER
from tests.architecture.source_tree import sources

TARGET = re.compile(r"megatron_rb(\.\w+)+:\w+")
TARGETS = sorted(
    {
        node.value
        for source in sources()
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and TARGET.fullmatch(node.value)
    }
)
"""What worker processes run, as the commands name it."""


def callers_of(name: str) -> list[str]:
    return sorted(
        {
            source.room
            for source in sources()
            for node in ast.walk(source.tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == name
        }
    )


@pytest.mark.parametrize("function", ["install_mcore_shims", "build_mesh"])
def test_worlds_are_opened_in_one_place(function: str):
    assert callers_of(function) == ["app.session"]


def test_the_world_is_joined_by_sessions_and_by_the_doctor_in_a_world_of_its_own():
    assert callers_of("start_process_group") == ["app.session", "parallel.doctor"]


def test_worker_processes_have_one_entry():
    """Beside it are programs of their own: `rb`, the launcher's processes, the doctor, the page of settings."""
    programs = [
        source.room
        for source in sources()
        for node in source.tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
    ]
    others = ["cli", "config.settings_page", "launch.agent", "launch.batch", "parallel.doctor"]
    assert programs == sorted([WORKER.partition(".")[2], *others])


def test_what_workers_run_is_known():
    assert len(TARGETS) >= 6


@pytest.mark.parametrize("target", TARGETS)
def test_function_that_is_named_by_a_string_exists_and_takes_a_session_or_the_folder(target: str):
    module, _, name = target.partition(":")
    taken = list(signature(getattr(import_module(module), name)).parameters)
    assert taken in (["session", "config", "folder"], ["folder"])
