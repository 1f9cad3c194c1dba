"""From recipe names and `key=value` overrides to one strict, typed `Config`; nobody else sees a DictConfig."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from megatron_rb.config.arguments import NULL, alternatives, as_text, holds_text, read_argument
from megatron_rb.config.recipes import compose_files
from megatron_rb.config.rules import check_values
from megatron_rb.config.schema import Config
from megatron_rb.config.written import NO_TEXT, load_yaml, value_of

CONF_MODULE = "megatron_rb.conf"

CONFIG_FILE = "config.yaml"
"""Name of the file in a folder that says all settings of what is done there."""

SETTINGS_FILE = "settings"
"""The word that names a file of settings."""

RENAMED = {"cluster.num_nodes": "cluster.nodes"}
"""Earlier names of settings, which old command lines and run folders still use."""


@dataclass(frozen=True)
class Setting:
    """One `key=value` of the command line: the choice of a file, or a value."""

    key: str
    value: Any
    picks_file: bool


def load_config(overrides: Sequence[str]) -> Config:
    """Compose `conf/config.yaml`, the chosen group files and the `key=value` overrides.

    `settings=FILE` stands for all settings of a yaml file (as `rb plan --yaml` writes it), at its place in the order.

    Raises:
        ValueError: an unknown key, group choice or a value of the wrong type, in one sentence.
    """
    settings = [item for text in overrides for item in _read(text)]
    config = _merge(_compose([item for item in settings if item.picks_file]), origin="conf/")
    for item in settings:
        if not item.picks_file:
            _apply(config, item)
    return _finish(config)


def with_settings(config: Config, overrides: Sequence[str]) -> Config:
    """The same config with `key=value` settings in place of its own; files of `conf/` cannot be chosen any more.

    Raises:
        ValueError: as `load_config`.
    """
    changed = OmegaConf.merge(OmegaConf.structured(Config), _escape(dataclasses.asdict(config)))
    assert isinstance(changed, DictConfig)
    for item in (item for text in overrides for item in _read(text)):
        if item.picks_file:
            raise ValueError(
                f"{item.key}={item.value} chooses a file of conf/; give single settings here, as a.b=value"
            )
        _apply(changed, item)
    return _finish(changed)


def expand_sweep(overrides: Sequence[str]) -> list[list[str]]:
    """Every combination of the settings that list several values (`optimizer.lr=1e-4,3e-4`), the last one fastest.

    A setting that is a text takes its commas as they are.
    """
    choices = [_values_of(text) for text in overrides]
    return [list(combination) for combination in itertools.product(*choices)]


def _values_of(text: str) -> list[str]:
    key, equals, raw = text.partition("=")
    declared = _type_of(RENAMED.get(key, key))
    if not equals or "," not in raw or declared in (None, str) and not group_choices(key):
        return [text]
    if holds_text(declared):
        return [f"{key}={value}" for value in alternatives(raw, declared)]
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        return [text]  # said properly when the setting is read
    if not override.is_sweep_override():
        return [text]
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def config_from_file(path: str | Path) -> Config:
    """Read a config that `save_config` wrote; as strict as `load_config`."""
    return _finish(_merge(_read_yaml(Path(path)), origin=str(path)))


def _read_yaml(path: Path) -> Mapping[Any, Any]:
    """The tree of a file of settings; its leaves are for `value_of`."""
    if not path.is_file():
        raise ValueError(f"there is no config file {path}")
    try:
        tree = load_yaml(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} is not valid YAML: it is nested too deep") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {_one_line(error)}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold settings as `key: value`")
    return tree


def save_config(config: Config, path: str | Path) -> None:
    """Write every setting, with all references resolved, so that `config_from_file` gives the same config back."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(_escape(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def group_choices(group: str) -> list[str]:
    """Names that `group=name` accepts, e.g. the recipes for group `experiment`."""
    folder = resources.files(CONF_MODULE) / group
    if not folder.is_dir():
        return []
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


@functools.cache
def setting_types() -> dict[str, Any]:
    """Declared type of every setting by its key `section.field`; sections are listed as well."""
    return dict(_walk(Config, ""))


def _walk(section: type, prefix: str) -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(section)
    for item in dataclasses.fields(section):
        declared = hints[item.name]
        yield prefix + item.name, declared
        if dataclasses.is_dataclass(declared):
            yield from _walk(typing.cast(type, declared), f"{prefix}{item.name}.")


def _read(text: str) -> list[Setting]:
    """One word of the command line: a setting, or a file of settings."""
    key, equals, path = text.partition("=")
    if key.strip() != SETTINGS_FILE or not equals:
        return [_parse(text)]
    return [Setting(name, value, False) for name, value in _known_leaves(_read_yaml(Path(path)), path)]


def keys_of(text: str) -> list[str]:
    """The settings, or the group of files, that a word of the command line sets; of a file of settings all in it.

    Raises:
        ValueError: as `load_config`.
    """
    return [item.key for item in _read(text)]


def _parse(text: str) -> Setting:
    key, equals, raw = text.partition("=")
    key = key.strip().lstrip("+")
    key = RENAMED.get(key, key)
    if not equals or not key or key.startswith("~"):
        raise ValueError(f"'{text}' is not a setting; write key=value, e.g. experiment=demo or parallel.tp_size=2")
    if group_choices(key):
        name = raw.strip() if raw.strip() == NULL else as_text(raw.strip())
        _check_choice(key, name)
        return Setting(key, name, True)
    _check_key(key)
    try:
        return Setting(key, read_argument(key, raw, _type_of(key)), False)
    except HydraException as error:
        raise ValueError(
            f"cannot read the value of '{text}' ({_one_line(error)}); put quotes around values with special characters"
        ) from error
    except ValueError as error:
        raise ValueError(f"{key} {error}" if str(error) == NO_TEXT else str(error)) from error


def _check_choice(group: str, name: Any) -> None:
    choices = group_choices(group)
    if name not in choices:
        hint = _did_you_mean(str(name), choices) or ";"
        raise ValueError(f"{group} has no choice '{name}'{hint} there are {', '.join(choices)}")


def _check_key(key: str) -> None:
    if _type_of(key) is None:
        outer = key.rpartition(".")[0]
        section = _type_of(outer)
        near = [f"{outer}.{item.name}" for item in dataclasses.fields(section)] if _is_named(outer, section) else []
        raise ValueError(f"there is no setting '{key}'{_did_you_mean(key, near or list(setting_types()))}")


def _is_named(key: str, declared: Any) -> bool:
    """Whether a key is that of a section that users name."""
    return key not in setting_types() and dataclasses.is_dataclass(declared)


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    """Close matches by the whole key, or by its last part in any section."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.75)
    last = word.rsplit(".", 1)[-1]
    by_name = {key.rsplit(".", 1)[-1]: key for key in reversed(known)}
    for name in difflib.get_close_matches(last, list(by_name), n=2, cutoff=0.7):
        if by_name[name] not in close:
            close.append(by_name[name])
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _compose(choices: Sequence[Setting]) -> Mapping[Any, Any]:
    try:
        # In quotes, so that Hydra takes no name for a number.
        return compose_files(CONF_MODULE, [f"{item.key}='{item.value}'" for item in choices])
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"the files in conf/ do not fit together: {_one_line(error)}") from error


def _merge(tree: Mapping[Any, Any], origin: str) -> DictConfig:
    """The schema's defaults with the values of `tree`, each checked."""
    config = OmegaConf.structured(Config)
    for key, value in _known_leaves(tree, origin):
        _set(config, key, value)
    return config


def _known_leaves(tree: Mapping[Any, Any], origin: str) -> Iterator[tuple[str, Any]]:
    """Every setting of a tree of `load_yaml` with its value; an unknown one, or one without a text, names the file."""
    for key, value in _leaves(tree):
        try:
            _check_key(key)
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from error
        try:
            yield key, value_of(value, _type_of(key))
        except ValueError as error:
            raise ValueError(f"{origin}: {key} {error}") from error


def _leaves(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        key = RENAMED.get(f"{prefix}{name}", f"{prefix}{name}")
        if _is_section(_type_of(key)) and isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _apply(config: DictConfig, item: Setting) -> None:
    if _is_section(_type_of(item.key)) and isinstance(item.value, Mapping) and item.value:
        for key, leaf in _leaves(item.value, f"{item.key}."):
            _check_key(key)
            _set(config, key, leaf)
    else:
        _set(config, item.key, item.value)


def _set(config: DictConfig, key: str, value: Any) -> None:
    _open_sections(config, key)
    if value == {} and _names_sections(_type_of(key)):
        OmegaConf.update(config, key, {}, merge=False)
        return
    try:
        OmegaConf.update(config, key, value, merge=isinstance(value, Mapping))
    except ValidationError as error:
        raise ValueError(f"{key} must be {_kind(_type_of(key))}, got {value!r}") from error
    except OmegaConfBaseException as error:
        raise ValueError(f"{key}: {_one_line(error)}") from error


def _open_sections(config: DictConfig, key: str) -> None:
    """Make the named section that a key lies in, where it is not there yet."""
    words = key.split(".")
    for count in range(1, len(words)):
        outer, name = ".".join(words[:count]), words[count]
        if _names_sections(_type_of(outer)) and name not in (sections := OmegaConf.select(config, outer)):
            sections[name] = typing.get_args(_type_of(outer))[1]()


def _names_sections(declared: Any) -> bool:
    """Whether a setting is a mapping of names to sections."""
    return typing.get_origin(declared) is dict and dataclasses.is_dataclass(typing.get_args(declared)[1])


def _type_of(key: str) -> Any:
    """Declared type of a key, also of one inside a mapping; None = there is no such setting."""
    types = setting_types()
    if key in types or "." not in key:
        return types.get(key)
    outer, _, name = key.rpartition(".")
    parent = _type_of(outer)
    if dataclasses.is_dataclass(parent):
        return typing.get_type_hints(parent).get(name)
    return typing.get_args(parent)[1] if typing.get_origin(parent) is dict else None


def _is_section(declared: Any) -> bool:
    """Whether there are settings within: a section, or a mapping of names to sections."""
    return dataclasses.is_dataclass(declared) or _names_sections(declared)


def _kind(declared: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    if declared in names:
        return names[declared]
    if typing.get_origin(declared) is list:
        return "a list, e.g. [a,b]"
    return "a mapping, e.g. {NAME: value}" if typing.get_origin(declared) is dict else "a section of settings"


def _finish(config: DictConfig) -> Config:
    try:
        result = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ValueError(f"{getattr(error, 'full_key', None) or 'config'}: {_one_line(error)}") from error
    assert isinstance(result, Config)
    check_values(result)
    return result


def _escape(value: Any) -> Any:
    # A literal "${" in a resolved value must not be taken for a reference when the file is read again.
    if isinstance(value, dict):
        return {key: _escape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escape(item) for item in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split("\n", 1)[0].split())
