"""Who may import whom, and which library is used where."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.architecture.source_tree import Source, sources

FLOORS = (
    ("config", "platform", "layout", "shapes"),
    ("parallel", "planner", "kernels", "metrics", "spatial", "value"),
    ("data", "builders", "scores"),
    ("models",),
    ("checkpoint", "capture"),
    ("train",),
    ("generation",),
    ("tasks", "evaluation", "parity", "comparison"),
    ("app",),
    ("bench", "rehearsal"),
)
"""The ground floor first. A room imports its own floor and lower ones; `bench` measures the launcher as well."""
LEVELS = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
BESIDE = ("launch", "tools", "conf", "cli")
"""No room imports them but each other: `cli` starts the files of `tools`, and these import whatever they need."""
STARTS_PROCESSES = ("bench",)
"""Rooms that may use the launcher, which stands beside the floors."""

ONLY_IN = [
    (("torch.cuda", "torch.musa", "torch_musa"), ("platform", "kernels", "rehearsal")),
    (("megatron.core.parallel_state", "megatron.core.mpu"), ("parallel",)),
    (("megatron.training", "megatron.legacy"), ()),
    (("hydra", "omegaconf"), ("config", "cli", "app")),
    (("transformers",), ("data", "checkpoint.hf", "tools")),
    (("triton",), ("kernels", "rehearsal")),
    (("os.environ", "os.getenv", "os.putenv"), ("platform", "parallel", "launch", "bench.launch", "rehearsal")),
]


def level_of(module: str) -> int | None:
    """None for what stands beside the floors."""
    return LEVELS.get(module.partition(".")[0])


def own_imports(source: Source) -> set[str]:
    modules = {item.module for item in sources()}
    return {name.partition(".")[2] for name in source.imports if name in modules and name != "megatron_rb"}


def test_every_room_has_a_place():
    rooms = {source.room for source in sources() if source.room and not source.is_in(*BESIDE)}
    assert [room for room in rooms if level_of(room) is None] == []


def test_imports_point_down():
    upward = [
        f"{source.room} (level {level_of(source.room)}) imports {name} (level {level_of(name)})"
        for source in sources()
        for name in own_imports(source)
        if level_of(source.room) is not None
        and (level_of(name) is None or level_of(name) > level_of(source.room))
        and not (source.is_in(*STARTS_PROCESSES) and name.startswith("launch."))
    ]
    assert upward == []


def test_launch_knows_the_config_and_the_standard_library_only():
    foreign = [
        f"{source.room} imports {name}"
        for source in sources()
        if source.is_in("launch")
        for name in source.imports
        if name.split(".")[0] not in sys.stdlib_module_names
        and not name.startswith(("megatron_rb.config", "megatron_rb.layout", "megatron_rb.launch", "jinja2"))
    ]
    assert foreign == []


@pytest.mark.parametrize("room", ["layout", "planner", "config", "shapes", "launch", "spatial", "value"])
def test_pure_rooms_do_without_torch(room: str):
    assert [source.room for source in sources() if source.is_in(room) and source.uses("torch", "megatron")] == []


@pytest.mark.parametrize(("names", "rooms"), ONLY_IN, ids=lambda value: " ".join(value) or "nowhere")
def test_library_stays_in_its_rooms(names: tuple[str, ...], rooms: tuple[str, ...]):
    assert [source.room for source in sources() if source.uses(*names) and not source.is_in(*rooms)] == []


def test_product_does_not_import_its_tests():
    assert [source.room for source in sources() if source.uses("tests")] == []


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


def rooms_imported() -> dict[str, set[str]]:
    """Rooms, with the folders in them as rooms of their own beside what lies directly in a room: `models`,
    `models.vision`, ... An import between a room and a folder in it is an import within the room."""
    graph: dict[str, set[str]] = {}
    for source in sources():
        here = room_of(source.room)
        for name in own_imports(source):
            there = room_of(name)
            if there and there != here and not (there.startswith(here + ".") or here.startswith(there + ".")):
                graph.setdefault(here, set()).add(there)
    return graph


def room_of(module: str) -> str:
    folders = {source.room for source in sources() if source.path.name == "__init__.py"}
    while module and module not in folders and module.partition(".")[2]:
        module = module.rpartition(".")[0]
    return module


def test_rooms_form_no_circle():
    graph = rooms_imported()
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"these rooms import each other: {' -> '.join(error.args[1])}")
    assert len(graph) > 25


def test_nothing_imports_the_tests():
    assert [source.room for source in sources() if source.uses("tests")] == []


def test_modules_form_no_cycle():
    graph = {source.room: own_imports(source) - {source.room} for source in sources()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"these modules import each other: {' -> '.join(error.args[1])}")
