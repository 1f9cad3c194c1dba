"""Adapters that peft makes for tiny models, and what transformers computes with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_rb.checkpoint.hf.adapters import factor_rules, open_adapter
from megatron_rb.checkpoint.hf.oracle import Trace, load_transformers, native_gradients, trace_of
from megatron_rb.data.sample import EncodedSample
from megatron_rb.shapes.shape import load_shape


def write_adapter(hf: Path, folder: Path, seed: int, **settings) -> Path:
    """An adapter as peft saves it, with second factors that are not zero."""
    from peft import LoraConfig, get_peft_model

    model = load_transformers(hf)
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(**settings))
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(folder)
    return folder


def load_adapted(hf: Path, folder: Path):
    """transformers' model with an adapter of peft, whose factors are trained."""
    from peft import PeftModel

    return PeftModel.from_pretrained(load_transformers(hf), folder, adapter_name="first", is_trainable=True)


def run_adapted(hf: Path, folder: Path, samples: Sequence[EncodedSample], name: str) -> Trace:
    """As `run_transformers`, with the gradients of the factors by native name."""
    shape = load_shape(hf)
    adapted = load_adapted(hf, folder)
    model = adapted.base_model.model
    trace = trace_of(model, shape, samples, grads=True)
    trace.gradients = factor_gradients(adapted, hf, folder, name) | {
        key: value for key, value in native_gradients(model, shape).items() if value.any()
    }
    return trace


def factor_gradients(adapted, hf: Path, folder: Path, name: str) -> dict[str, torch.Tensor]:
    shape = load_shape(hf)
    parameters = dict(adapted.named_parameters())
    rules = factor_rules(open_adapter(folder, name, shape).adapter, shape)
    return {
        native: rule.join([parameters[each.replace(".weight", ".first.weight")].grad for each in rule.hf_names])
        for native, rule in rules.items()
    }
