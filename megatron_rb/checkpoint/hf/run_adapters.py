"""The adapters that the settings of a run ask for, some of them read from folders of peft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_rb.checkpoint.hf.adapters import open_adapter
from megatron_rb.checkpoint.hf.in_full import trained_in_full
from megatron_rb.checkpoint.hf.table import stored_rules
from megatron_rb.config.schema import AdapterConfig, ModelConfig
from megatron_rb.models.adapters.plan import Adapter, adapted, adapters_of
from megatron_rb.shapes.linears import linears
from megatron_rb.shapes.shape import RoboBrainShape


def adapters_of_run(settings: ModelConfig, shape: RoboBrainShape) -> tuple[Adapter, ...]:
    """The adapters that a run trains; those of peft's folders as these say, but for what is dropped.

    Raises:
        ValueError: a pattern means no linear, or a folder does not fit the model.
    """
    begun = {name: each for name, each in settings.adapters.items() if each.init}
    fresh = {name: each for name, each in settings.adapters.items() if not each.init}
    read = {name: _begun(name, each, settings, shape) for name, each in begun.items()}
    made = {adapter.name: adapter for adapter in adapters_of(fresh, shape)}
    adapters = tuple({**read, **made}[name] for name in settings.adapters)
    _check_apart(adapters, settings.train_in_full, shape)
    return adapters


def _begun(name: str, each: AdapterConfig, settings: ModelConfig, shape: RoboBrainShape) -> Adapter:
    """The adapter of a folder. What was trained in full beside it is no part of the base: left frozen, it would be in
    no checkpoint."""
    opened, whole = open_adapter(each.init, name, shape), trained_in_full(settings.train_in_full, shape)
    table = stored_rules(shape)
    stored = {hf_name for key in whole for hf_name in table[key].hf_names}
    lost = [hf_name for hf_name in opened.in_full if hf_name not in stored]
    if lost:
        raise ValueError(
            f"model.adapters.{name}.init: {each.init} holds {lost[0]}, which was trained in full; name its module in "
            "model.train_in_full too"
        )
    return replace(opened.adapter, dropout=each.dropout)


def _check_apart(adapters: Sequence[Adapter], in_full: Sequence[str], shape: RoboBrainShape) -> None:
    """Refuse a linear that has factors and is trained in full as well."""
    whole = trained_in_full(in_full, shape)
    for linear in linears(shape):
        if f"{linear.name}.weight" in whole and any(adapted(adapter, linear) for adapter in adapters):
            raise ValueError(
                f"{linear.modules[0].name} is trained in full (model.train_in_full) and has factors (model.adapters); "
                "leave it out of one of them"
            )
