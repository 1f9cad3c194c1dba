"""Values as they were written: a text setting keeps its text, from YAML and from the command line alike.

YAML 1.1 reads a bare `12:30:00` as 45000, `010` as 8, `on` as true and `1e3` as 1000.0; Hydra's grammar of the command
line has readings of its own. Whether such a reading is meant depends on the type that the schema declares. So files are
read with every bare scalar as a text that is marked as bare, whatever composes them carries these texts along, and only
where the declared type of a setting is known is a bare scalar read as what it has to be.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from omegaconf import OmegaConf

BARE = "\ue000"
"""Before the text of a scalar that stood in YAML without quotes; a character that Unicode leaves to private use."""

OTHER_BASE = re.compile(r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")
"""Whole numbers and fractions that YAML 1.1 does not read to the base of 10."""

NO_TEXT = "must be a text, got None; write '' for none, or 'null' in quotes for the word"


class _BareLoader(yaml.SafeLoader):
    """Bare scalars become marked texts, keys stay as written, and a key that stands twice is refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        self.flatten_mapping(node)
        mapping: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a text", key_node.start_mark)
            key = str(key_node.value)
            if key in mapping:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' stands twice", key_node.start_mark
                )
            mapping[key] = self.construct_object(value_node, deep=deep)
        return mapping

    def construct_bare(self, node: yaml.ScalarNode) -> str:
        return str(node.value) if node.style in ("'", '"', "|", ">") else BARE + str(node.value)

    def construct_nothing(self, node: yaml.ScalarNode) -> None:
        return None


def _construct_yaml_map(loader: _BareLoader, node: yaml.MappingNode) -> Iterator[dict[Any, Any]]:
    mapping: dict[Any, Any] = {}
    yield mapping
    mapping.update(loader.construct_mapping(node))


for _tag in ("str", "int", "float", "bool", "timestamp"):
    _BareLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _BareLoader.construct_bare)
_BareLoader.add_constructor("tag:yaml.org,2002:null", _BareLoader.construct_nothing)
_BareLoader.add_constructor("tag:yaml.org,2002:map", _construct_yaml_map)


def load_yaml(text: str) -> Any:
    """The tree of a YAML text with every bare scalar as a marked text; give its leaves to `value_of`.

    Raises:
        yaml.YAMLError: it is no YAML, or a key stands twice.
    """
    return yaml.load(text, Loader=_BareLoader)  # noqa: S506 (a SafeLoader)


def value_of(tree: Any, declared: Any) -> Any:
    """A value of `load_yaml`, read as the declared type wants it.

    Raises:
        ValueError: a null where a text belongs.
    """
    if isinstance(tree, str):
        if not tree.startswith(BARE):
            return tree
        return tree[len(BARE) :] if declared is str else _plain(tree[len(BARE) :])
    if tree is None and declared is str:
        raise ValueError(NO_TEXT)
    if isinstance(tree, Mapping):
        return {key: value_of(item, declared_inside(declared, key)) for key, item in tree.items()}
    if isinstance(tree, list):
        return [value_of(item, declared_inside(declared)) for item in tree]
    return tree


def _plain(text: str) -> Any:
    """What YAML makes of a bare scalar, with numbers such as `1e-3` as OmegaConf reads them.

    Numbers to the base of 60 or 8 stay texts: `1:30` is no number here, and `010` is ten, as on the command line.
    """
    if OTHER_BASE.fullmatch(text):
        return text
    try:
        return OmegaConf.to_container(OmegaConf.create(f"- {text}\n"), resolve=False)[0]  # type: ignore[index, call-overload]
    except yaml.YAMLError:
        return text


def declared_inside(declared: Any, key: str = "") -> Any:
    """Declared type of the items of a list or mapping, or of a field of a section."""
    if dataclasses.is_dataclass(declared):
        return typing.get_type_hints(declared).get(key)
    arguments = typing.get_args(declared)
    return arguments[-1] if arguments else None
