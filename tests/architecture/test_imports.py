"""Who may import whom, and which library is used where."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.architecture.source_tree import Source, sources

LEVELS = {
    "train.main": 6,
    "train.capture_main": 6,
    "cli": 6,
    "train.assemble": 6,
    "tasks": 5,
    "evaluation": 5,
    "train": 4,
    "checkpoint": 3,
    "models": 2,
    "data": 2,
    "parallel": 1,
    "planner": 1,
    "kernels": 1,
    "metrics": 1,
    "spatial": 1,
    "value": 1,
    "config": 0,
    "platform": 0,
    "layout": 0,
}
"""Most specific name first; a room imports its own level and lower ones."""

ONLY_IN = [
    (("torch.cuda", "torch.musa", "torch_musa"), ("platform", "kernels")),
    (("megatron.core.parallel_state", "megatron.core.mpu"), ("parallel",)),
    (("megatron.training", "megatron.legacy"), ()),
    (("hydra", "omegaconf"), ("config", "cli", "train.main")),
    (("transformers",), ("data", "checkpoint.hf", "tools")),
    (("triton",), ("kernels",)),
    (("os.environ", "os.getenv", "os.putenv"), ("platform", "parallel", "launch")),
]


def level_of(room: str) -> int | None:
    """None for what stands beside the levels."""
    return next((LEVELS[name] for name in LEVELS if room == name or room.startswith(name + ".")), None)


def own_imports(source: Source) -> set[str]:
    modules = {item.module for item in sources()}
    return {name.partition(".")[2] for name in source.imports if name in modules and name != "megatron_rb"}


def test_every_room_has_a_place():
    rooms = {source.room for source in sources() if source.room and not source.is_in("launch", "tools", "conf", "cli")}
    assert [room for room in rooms if level_of(room) is None] == []


def test_imports_point_down():
    upward = [
        f"{source.room} (level {level_of(source.room)}) imports {name} (level {level_of(name)})"
        for source in sources()
        for name in own_imports(source)
        if level_of(source.room) is not None and (level_of(name) is None or level_of(name) > level_of(source.room))
    ]
    assert upward == []


def test_launch_knows_the_config_and_the_standard_library_only():
    foreign = [
        f"{source.room} imports {name}"
        for source in sources()
        if source.is_in("launch")
        for name in source.imports
        if name.split(".")[0] not in sys.stdlib_module_names
        and not name.startswith(("megatron_rb.config.", "megatron_rb.launch.", "jinja2"))
        and name not in ("megatron_rb.config", "megatron_rb.launch")
    ]
    assert foreign == []


@pytest.mark.parametrize("room", ["layout", "planner", "config", "launch", "spatial", "value"])
def test_pure_rooms_do_without_torch(room: str):
    assert [source.room for source in sources() if source.is_in(room) and source.uses("torch", "megatron")] == []


@pytest.mark.parametrize(("names", "rooms"), ONLY_IN, ids=lambda value: " ".join(value) or "nowhere")
def test_library_stays_in_its_rooms(names: tuple[str, ...], rooms: tuple[str, ...]):
    assert [source.room for source in sources() if source.uses(*names) and not source.is_in(*rooms)] == []


def test_product_does_not_import_its_tests():
    """`rb bench launch` is the one that still measures with what the tests have."""
    assert [source.room for source in sources() if source.uses("tests")] == ["tools._bench_launch"]


def calls_at_import(tree: ast.AST) -> set[str]:
    """Names of the functions that are called when a module is imported, in class bodies and default values too."""
    names = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Lambda):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node = ast.Module([*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)], [])
        if isinstance(node, ast.Call):
            names.add(ast.unparse(node.func).rpartition(".")[2])
        names |= calls_at_import(node)
    return names


def test_no_module_chooses_a_platform_at_import():
    assert calls_at_import(ast.parse("def f(x=get_platform()): return choose()\nclass A:\n    b = c.d()")) == {
        "get_platform",
        "d",
    }
    binding = {"get_platform", "current_device", "install_mcore_shims"}
    assert [source.room for source in sources() if calls_at_import(source.tree) & binding] == []


def test_imports_are_absolute():
    assert [source.room for source in sources() if any(name.startswith(".") for name in source.imports)] == []


def test_modules_form_no_cycle():
    graph = {source.room: own_imports(source) - {source.room} for source in sources()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"these modules import each other: {' -> '.join(error.args[1])}")
