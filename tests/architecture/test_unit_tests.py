"""Who changes a module of the model, of training, of the tasks or of the parallel world finds its test at its path."""

import pytest

from tests.architecture.source_tree import REPOSITORY, Source, sources

ROOMS = ("models", "train", "tasks", "parallel")
SMALL = 30
"""Lines of a module that says too little to be tested alone; those that have a test nevertheless keep it."""
ELSEWHERE = {
    "models.transformer_engine": "imports a package that few machines have; tests/parity/test_layouts.py runs it on a "
    "stand-in, which has to be there before megatron-core is imported",
    "train.task": "a protocol and a record: nothing runs",
}
"""Modules without a test at their path, and why."""


def of_rooms() -> list[Source]:
    return [source for source in sources() if source.is_in(*ROOMS) and source.path.name != "__init__.py"]


def unit_test_of(source: Source) -> str:
    *folders, name = source.room.split(".")
    return "/".join(["tests", "unit", *folders, f"test_{name}.py"])


@pytest.mark.parametrize("source", of_rooms(), ids=lambda source: source.room)
def test_module_has_its_unit_test_at_its_path(source: Source):
    lines = len(source.path.read_text(encoding="utf-8").splitlines())
    there = (REPOSITORY / unit_test_of(source)).is_file()
    assert there or lines <= SMALL or source.room in ELSEWHERE, f"write {unit_test_of(source)}"


def test_exceptions_are_modules_that_have_no_test():
    missing = {source.room for source in of_rooms() if not (REPOSITORY / unit_test_of(source)).is_file()}
    assert set(ELSEWHERE) - missing == set()
