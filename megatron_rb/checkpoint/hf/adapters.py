"""Adapters in the files of peft: `adapter_config.json` and `adapter_model.safetensors`.

Names are those of transformers' modules below `base_model.model.`, as peft loads them and vLLM maps them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megatron_rb.checkpoint.hf.names import canonical_name
from megatron_rb.checkpoint.hf.table import RowBlock, WeightRule, rows_of_linear, weight_table
from megatron_rb.models.adapters.plan import Adapter, adapted
from megatron_rb.shapes.foreign import ADAPTER_CONFIG
from megatron_rb.shapes.linears import VISUAL, ModelLinear, linears
from megatron_rb.shapes.patterns import matching
from megatron_rb.shapes.shape import RoboBrainShape

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
NOTED = "manifest.json"
"""What a conversion says of what it wrote."""
READ = frozenset({"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "init_lora_weights"})
"""Fields that say what an adapter computes, and are followed."""
NO_MATTER = frozenset(
    {
        *("base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping", "peft_version"),
        *("target_modules", "exclude_modules", "modules_to_save", "runtime_config", "qalora_group_size"),
        *("megatron_core", "ensure_weight_tying", "prune_temporary_fields"),
    }
)
"""Fields that say where it belongs; which modules it changes is seen by its tensors."""
CHANGES_THE_BASE = ("pissa", "olora", "corda", "eva", "loftq", "lora_ga")
"""Ways to begin that have changed the base weights too: what was saved belongs to those."""


def factor_rules(adapter: Adapter, shape: RoboBrainShape) -> dict[str, WeightRule]:
    """The way from and to peft's tensors of every factor, by native name."""
    rules = {}
    for linear in linears(shape):
        for number in adapted(adapter, linear):
            module = linear.modules[number]
            name = f"{linear.name}.adapters.{adapter.name}.{module.name.rpartition('.')[2]}"
            first = (adapter.rank, linear.inputs)
            second = (module.outputs, adapter.rank)
            rules[f"{name}.lora_A"] = _rule(module.name, "A", first, (RowBlock(0, 0, adapter.rank),))
            rules[f"{name}.lora_B"] = _rule(module.name, "B", second, _rows(linear, number, shape))
    return rules


def _rule(module: str, factor: str, size: tuple[int, int], runs: tuple[RowBlock, ...]) -> WeightRule:
    return WeightRule(size, (f"{PREFIX}{module}.lora_{factor}.weight",), (size,), runs)


def _rows(linear: ModelLinear, number: int, shape: RoboBrainShape) -> tuple[RowBlock, ...]:
    """Rows of one module in the order in which they lie in the linear."""
    blocks = [block for block in rows_of_linear(linear, shape) if block.source == number]
    return tuple(RowBlock(0, block.start, block.count) for block in blocks)


@dataclass(frozen=True)
class PeftFolder:
    """What a folder of peft holds, checked against a model."""

    folder: Path
    adapter: Adapter
    names: Mapping[str, str]
    """Names in the file by the names that `factor_rules` gives, and by transformers' names for what was trained in
    full."""
    in_full: tuple[str, ...]
    """Tensors of transformers that were trained in full beside it."""
    digest: str
    """Of the weights that it belongs to, where this stack has written it; else empty."""

    def read(self, name: str) -> torch.Tensor:
        """A tensor of the file, by one of `names`."""
        with safe_open(self.folder / WEIGHTS, framework="pt") as file:
            return file.get_tensor(self.names[name])

    def changes(self, name: str) -> bool:
        """Whether there are factors for a tensor of transformers."""
        return name.endswith(".weight") and name.removesuffix(".weight") in self.adapter.modules

    def update(self, name: str) -> torch.Tensor:
        """What is added to the weight of an adapted module, in fp32."""
        module = f"{PREFIX}{name.removesuffix('.weight')}"
        first, second = (self.read(f"{module}.lora_{factor}.weight").float() for factor in "AB")
        return self.adapter.scale * (second @ first)


def open_adapter(folder: str | Path, name: str, shape: RoboBrainShape) -> PeftFolder:
    """Read the description of an adapter and look at its tensors.

    Args:
        name: that it gets here.

    Raises:
        ValueError: it is of a kind that is not supported, or does not fit the model.
    """
    path = Path(folder)
    settings = _settings(path)
    _check_kind(path, settings)
    if not (path / WEIGHTS).is_file():
        raise ValueError(f"{path} has no {WEIGHTS}; save the adapter as safetensors")
    with safe_open(path / WEIGHTS, framework="pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    names = {_canonical(key): key for key in shapes}
    rank = _number(path, settings, "r", 8)
    by_module = {module.name: linear for linear in linears(shape) for module in linear.modules}
    factors = [key for key in names if key.endswith((".lora_A.weight", ".lora_B.weight"))]
    modules = {key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in factors}
    unknown = sorted(modules - by_module.keys())
    if unknown or not modules:
        what = f"changes {unknown[0]}, which is no linear of this model" if unknown else "holds no factor of LoRA"
        raise ValueError(f"{path} {what}; it belongs to {settings.get('base_model_name_or_path') or 'another model'}")
    adapter = Adapter(
        name,
        frozenset(modules),
        rank,
        _number(path, settings, "lora_alpha", 8),
        float(settings.get("lora_dropout") or 0.0),
        bool(settings.get("use_rslora")),
    )
    in_full = tuple(sorted(set(names) - set(factors)))
    _check_shapes(path, adapter, shape, names, shapes, in_full)
    return PeftFolder(path, adapter, names, in_full, _digest(path))


def _digest(path: Path) -> str:
    """Of the base weights, as a conversion has noted it beside the adapter."""
    file = path / NOTED
    return str(json.loads(file.read_text(encoding="utf-8")).get("base", "")) if file.is_file() else ""


def adapters_of_manifest(model: Mapping[str, Any], shape: RoboBrainShape) -> tuple[Adapter, ...]:
    """The adapters that the `model` of a checkpoint's manifest tells of."""
    names = [module.name for linear in linears(shape) for module in linear.modules]
    return tuple(
        Adapter(
            name,
            frozenset(found for pattern in each["modules"] for found in matching(pattern, names)),
            each["rank"],
            each["alpha"],
            rslora=each["rslora"],
        )
        for name, each in model["adapters"].items()
    )


def _settings(path: Path) -> dict[str, Any]:
    file = path / ADAPTER_CONFIG
    if not file.is_file():
        raise ValueError(f"{path} has no {ADAPTER_CONFIG}; name a folder that peft's save_pretrained has written")
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{file} holds no object of fields")
    return tree


def _check_kind(path: Path, settings: Mapping[str, Any]) -> None:
    """Raise ValueError for whatever LoRA and rsLoRA are not."""
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{path} holds an adapter of kind {kind}; LoRA and rsLoRA are read here")
    if settings.get("use_dora"):
        raise ValueError(f"{path} holds a DoRA adapter (use_dora); LoRA and rsLoRA are read here")
    if settings.get("bias", "none") != "none":
        raise ValueError(f"{path} has trained biases (bias: {settings['bias']}); only bias: none is read here")
    begun = str(settings.get("init_lora_weights", True)).lower()
    if begun.startswith(CHANGES_THE_BASE):
        raise ValueError(
            f"{path} was begun with init_lora_weights: {begun}, which changes the base too; save it with peft's "
            "path_initial_model_for_weight_conversion, which makes plain LoRA of it"
        )
    others = [name for name, value in settings.items() if name not in READ | NO_MATTER and value not in _EMPTY]
    if others:
        raise ValueError(f"{path} sets {others[0]}: {settings[others[0]]}, which is not supported here")


_EMPTY: tuple[Any, ...] = (None, False, {}, [], "")


def _number(path: Path, settings: Mapping[str, Any], name: str, usual: int) -> Any:
    value = settings.get(name, usual)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ValueError(f"{path / ADAPTER_CONFIG}: {name} is {value!r}; it is a number above 0")
    return value


def _canonical(key: str) -> str:
    """peft's name with transformers' current name of the module; peft writes the name of an adapter in some places."""
    inner = canonical_name(key.removeprefix(PREFIX)).replace(".modules_to_save.default.", ".")
    return f"{PREFIX}{inner}" if ".lora_" in inner else inner


def _check_shapes(
    path: Path,
    adapter: Adapter,
    shape: RoboBrainShape,
    names: Mapping[str, str],
    found: Mapping[str, tuple[int, ...]],
    in_full: Iterable[str],
) -> None:
    wanted = {rule.hf_names[0]: rule.hf_shapes[0] for rule in factor_rules(adapter, shape).values()}
    whole = {
        name: size
        for rule in weight_table(shape).values()
        for name, size in zip(rule.hf_names, rule.hf_shapes, strict=True)
    }
    for name in in_full:
        if name not in whole:
            raise ValueError(f"{path} holds {names[name]}, which is no tensor of this model and no factor of LoRA")
        wanted[name] = whole[name]
    for name, size in wanted.items():
        if name not in names:
            raise ValueError(f"{path} lacks {name}")
        if found[names[name]] != size:
            raise ValueError(
                f"{path}: {names[name]} has the shape {list(found[names[name]])} where this model has {list(size)}"
            )


def describe(adapter: Adapter, base: str, in_full: Sequence[str], shape: RoboBrainShape) -> dict[str, Any]:
    """The adapter_config.json of an adapter.

    Args:
        base: folder or name of the model that it belongs to.
        in_full: transformers' modules that were trained in full beside it.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": sorted(in_full) or None,
        "target_modules": target_modules(adapter, shape),
    }


def target_modules(adapter: Adapter, shape: RoboBrainShape) -> list[str]:
    """The shortest last words that mean the adapter's modules and no others of the model, else whole names."""
    names = [module.name for linear in linears(shape) for module in linear.modules] + [f"{VISUAL}.patch_embed.proj"]
    chosen: set[str] = set()
    for name in adapter.modules:
        words = name.split(".")
        # A number alone would mean layers to peft.
        endings = [".".join(words[-count:]) for count in (1, 2) if not words[-count].isdigit()]
        fitting = [word for word in endings if adapter.modules.issuperset(matching(word, names))]
        chosen.add(fitting[0] if fitting else name)
    return sorted(chosen)
