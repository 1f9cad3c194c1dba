"""The product's source files with what each imports and uses, read by AST (nothing is imported)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
BESIDE = ("kernels", "launch", "conf", "tools")
"""Sub-packages of megatron_rb whose folders lie at the top, reached by symlinks."""


@dataclass(frozen=True)
class Source:
    path: Path
    module: str
    """Dotted name, e.g. `megatron_rb.launch.main`."""

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(encoding="utf-8"), filename=str(self.path))

    @property
    def room(self) -> str:
        """The part of the name below megatron_rb, e.g. `checkpoint.hf.reader`."""
        return self.module.partition(".")[2]

    def is_in(self, *rooms: str) -> bool:
        return any(self.room == room or self.room.startswith(room + ".") for room in rooms)

    @cached_property
    def imports(self) -> frozenset[str]:
        """Everything imported at run time, `from a import b` as `a` and `a.b`."""
        names: set[str] = set()
        for node in _run_time_nodes(self.tree):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = "." * node.level + (node.module or "")
                names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        return frozenset(names)

    @cached_property
    def attributes(self) -> frozenset[str]:
        """Every dotted use such as `os.environ.get` and its prefixes."""
        return frozenset(ast.unparse(node) for node in ast.walk(self.tree) if isinstance(node, ast.Attribute))

    def uses(self, *names: str) -> bool:
        """Whether one of the dotted names, or something below it, is imported or used."""
        seen = self.imports | self.attributes
        return any(item == name or item.startswith(name + ".") for item in seen for name in names)


@lru_cache(maxsize=1)
def sources() -> tuple[Source, ...]:
    package = REPOSITORY / "megatron_rb"
    files = [path for path in package.rglob("*.py") if path.relative_to(package).parts[0] not in BESIDE]
    found = [Source(path, _dotted(path.relative_to(REPOSITORY))) for path in files]
    for name in BESIDE:
        for path in (REPOSITORY / name).rglob("*.py"):
            found.append(Source(path, "megatron_rb." + _dotted(path.relative_to(REPOSITORY))))
    return tuple(sorted(found, key=lambda source: source.module))


def _dotted(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those below `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for other in node.orelse:
                yield from (other, *_run_time_nodes(other))
            continue
        yield node
        yield from _run_time_nodes(node)
