"""Hydra composes the recipes of a package; this source of its files reads their values as they were written."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from importlib import resources
from typing import Any

import yaml
from hydra import compose, version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from omegaconf import OmegaConf

from megatron_rb.config.written import load_yaml, value_of

DEFAULTS_LIST = "defaults"
"""Key of Hydra's list of files, which is never a setting."""


class RecipeSource(ConfigSource):
    """The package of recipes as a source of Hydra's, read by `load_yaml`."""

    @staticmethod
    def scheme() -> str:
        return "recipes"

    def load_config(self, config_path: str) -> ConfigResult:
        file = self._file(self._normalize_file_name(config_path))
        if not file.is_file():
            raise ConfigLoadError(f"there is no file {config_path} in conf/")
        text = file.read_text(encoding="utf-8")
        try:
            tree = load_yaml(text) or {}
        except yaml.YAMLError as error:
            raise ConfigLoadError(f"{config_path} is not valid YAML: {error}") from error
        if DEFAULTS_LIST in tree:
            tree[DEFAULTS_LIST] = value_of(tree[DEFAULTS_LIST], None)
        header = ConfigSource._get_header_dict(text)
        where = f"{self.scheme()}://{self.path}"
        return ConfigResult(provider=self.provider, path=where, config=OmegaConf.create(tree), header=header)

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return self._file(config_path).is_dir()

    def is_config(self, config_path: str) -> bool:
        return self._file(self._normalize_file_name(config_path)).is_file()

    def list(self, config_path: str, results_filter: Any) -> list[str]:
        found: list[str] = []
        for item in self._file(config_path).iterdir():
            self._list_add_result(found, f"{config_path}/{item.name}".lstrip("/"), item.name, results_filter)
        return sorted(set(found))

    def _file(self, config_path: str) -> Any:
        return resources.files(self.path).joinpath(config_path)


def compose_files(package: str, choices: Sequence[str]) -> dict[str, Any]:
    """What Hydra composes of `config.yaml` of a package of recipes and these choices, its leaves for `value_of`.

    Raises:
        HydraException, OmegaConfBaseException: the files do not fit together.
    """
    Plugins.instance().register(RecipeSource)
    search_path = create_config_search_path(f"{RecipeSource.scheme()}://{package}")
    before = copy.deepcopy(GlobalHydra.instance())
    GlobalHydra.instance().clear()
    try:
        # As hydra.initialize_config_dir does it, which takes folders only.
        version.setbase("1.3")
        Hydra.create_main_hydra2("rb", search_path)
        tree = OmegaConf.to_container(compose("config", overrides=list(choices)), resolve=False)
    finally:
        GlobalHydra.set_instance(before)
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}
