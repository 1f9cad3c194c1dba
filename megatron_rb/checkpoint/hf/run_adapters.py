"""The adapters that the settings of a run ask for, some of them read from folders of peft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_rb.checkpoint.hf.adapters import open_adapter
from megatron_rb.checkpoint.hf.in_full import trained_in_full
from megatron_rb.config.schema import ModelConfig
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
    read = {
        name: replace(open_adapter(each.init, name, shape).adapter, dropout=each.dropout)
        for name, each in begun.items()
    }
    made = {adapter.name: adapter for adapter in adapters_of(fresh, shape)}
    adapters = tuple({**read, **made}[name] for name in settings.adapters)
    _check_apart(adapters, settings.train_in_full, shape)
    return adapters


def _check_apart(adapters: Sequence[Adapter], in_full: Sequence[str], shape: RoboBrainShape) -> None:
    """Refuse a linear that has factors and is trained in full as well."""
    whole = trained_in_full(in_full, shape)
    for linear in linears(shape):
        if f"{linear.name}.weight" in whole and any(adapted(adapter, linear) for adapter in adapters):
            raise ValueError(
                f"{linear.modules[0].name} is trained in full (model.train_in_full) and has factors (model.adapters); "
                "leave it out of one of them"
            )
