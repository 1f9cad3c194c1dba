"""What settings of adapters may be, on their own and beside others."""

from __future__ import annotations

import re

from megatron_rb.config.schema import AdapterConfig, Config, FreezeConfig

NAME = re.compile(r"[A-Za-z0-9_-]+")


def check_adapters(config: Config) -> None:
    """Raise ValueError for adapters that cannot be meant, or not together with other settings."""
    model = config.model
    if model.train_in_full and not model.adapters:
        raise ValueError(
            "model.train_in_full names what is trained in full beside adapters, and model.adapters is empty; without "
            "adapters everything is trained that model.freeze does not name"
        )
    if not model.adapters:
        return
    if model.freeze != FreezeConfig():
        raise ValueError(
            "model.adapters freezes all other weights already; leave model.freeze alone, and name what is trained in "
            "full in model.train_in_full"
        )
    if config.checkpoint.init == "random":
        raise ValueError(
            "model.adapters belong to weights, and checkpoint.init is random; name a Hugging Face folder in it, or in "
            "model.hf_path"
        )
    for name, settings in model.adapters.items():
        _check(name, settings)


def _check(name: str, settings: AdapterConfig) -> None:
    where = f"model.adapters.{name}"
    if not NAME.fullmatch(name):
        raise ValueError(f"model.adapters: '{name}' is no name; use letters, digits, _ and -")
    if not settings.patterns:
        raise ValueError(f"{where}.patterns is empty; name linears, or all-linear")
    if settings.rank < 1:
        raise ValueError(f"{where}.rank is {settings.rank}; it is at least 1")
    if not 0 < settings.alpha < float("inf"):
        raise ValueError(f"{where}.alpha is {settings.alpha:g}; it is above 0")
    if not 0 <= settings.dropout < 1:
        raise ValueError(f"{where}.dropout is {settings.dropout:g}; it is at least 0 and below 1")
