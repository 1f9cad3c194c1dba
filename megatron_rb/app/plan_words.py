"""The words of `rb plan`: what is asked, and settings of a run; imports no torch."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_rb.app.planning import Request
from megatron_rb.config.compose import group_choices, keys_of, load_config
from megatron_rb.data.mixes import MIXES, load_mix
from megatron_rb.data.mock_samples import mix_histogram
from megatron_rb.planner.device import beyond, load_device, with_memory
from megatron_rb.planner.histogram import Histogram, load_histogram
from megatron_rb.shapes.published import absent_name, shape_of
from megatron_rb.shapes.shape import RoboBrainShape

SHORT = {
    "seq_length": "data.seq_length",
    "max_patches": "data.max_patches",
    "global_batch_size": "data.global_batch_size",
    "dtype": "model.dtype",
}
"""Words of `rb plan` that are settings of a run."""
DEGREES = ("tp", "pp", "vpp", "cp", "micro_batch", "sequence_parallel")
OWN = ("model", "cluster", "gpus", "data", "max_gpu_memory", "calibration", *DEGREES, *SHORT)
PLANNED = {
    "model.recompute": "",
    "parallel.auto": "",
    "parallel.layout": "",
    "parallel.tp_size": "tp",
    "parallel.pp_size": "pp",
    "parallel.cp_size": "cp",
    "parallel.sequence_parallel": "sequence_parallel",
    "planner.device": "cluster",
    "planner.histogram": "data",
    "planner.calibration": "calibration",
    "planner.max_memory": "max_gpu_memory",
    "data.train": "data",
    "world_size": "gpus",
    "cluster.nodes": "gpus",
    "cluster.processes_per_node": "gpus",
}
"""Settings of a run that a plan does not read, and the word that says it here; empty = what the plan finds out."""
NO_DATA_MIX = "images_16k"
"""What samples are taken to be like where no data are named."""
UNITS = {"": 1.0, "gb": 1e9, "gib": 2.0**30, "g": 1e9, "mb": 1e6, "mib": 2.0**20}
SIZE = re.compile(r"([0-9.]+(?:e[+-]?[0-9]+)?) ?([a-z]*)", re.IGNORECASE)


def read_request(words: Sequence[str]) -> Request:
    """Read `key=value` words; what is no word of `rb plan` is a setting of the run, e.g. `model.freeze.vision=true`.

    Raises:
        ValueError: a word is unknown, missing or has a value that cannot be meant.
    """
    given, settings = _split(words)
    _check_complete(given, settings)
    _check_settings(given, settings)
    settings += [f"{SHORT[key]}={given[key]}" for key in SHORT if key in given]
    shape, model_settings = _model(given.get("model", ""))
    config = load_config([*model_settings, *settings])
    shape = shape or shape_of(config.model.hf_path, config.model.published)
    whole = load_device(given["cluster"])
    memory = read_bytes(given["max_gpu_memory"]) if "max_gpu_memory" in given else whole.memory
    asked = {name: _whole(name, given[name]) for name in DEGREES if name in given}
    return Request(
        with_memory(whole, memory),
        _whole("gpus", given["gpus"]),
        _histogram(given.get("data", ""), shape),
        shape,
        config,
        given.get("calibration", ""),
        asked,
        beyond(whole, memory),
    )


def _split(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Words of `rb plan` with their values, and settings of a run."""
    given: dict[str, str] = {}
    settings: list[str] = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"'{word}' is no key=value; e.g. rb plan model=robobrain20_32b cluster=h200 gpus=512")
        if key in OWN:
            if key in given:
                raise ValueError(f"{key} is given twice, as {given[key]} and as {value}; leave one of them out")
            if not value.strip():
                raise ValueError(f"{key}= has no value; give one, or leave the word out")
            given[key] = value
        elif "." in key or key in ("experiment", "settings"):
            settings.append(word)
        else:
            close = difflib.get_close_matches(key, [*OWN, "experiment"], n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(OWN)} and experiment"
            raise ValueError(f"rb plan knows no '{key}'{hint}")
    return given, settings


def _check_settings(given: Mapping[str, str], settings: Sequence[str]) -> None:
    """Refuse settings that would change nothing, or that another word or setting changes as well."""
    instead = {**PLANNED, **({"model.hf_path": "model"} if "model" in given else {})}
    instead |= {SHORT[word]: word for word in given if word in SHORT}
    seen: set[str] = set()
    for key in (key for text in settings for key in keys_of(text)):
        name = next((name for name in instead if f"{key}.".startswith(f"{name}.")), "")
        word = instead.get(name, "")
        if word:
            raise ValueError(f"rb plan does not read {key}; {word}= says it here{' already' if word in given else ''}")
        if name:
            raise ValueError(f"rb plan does not read {key}: it is what the plan finds out; leave it out")
        if key in seen:
            raise ValueError(f"{key} is given twice; leave one of them out")
        seen.add(key)


def _histogram(data: str, shape: RoboBrainShape) -> Histogram:
    """Of a file that `rb data stats` wrote, or of a mix of `rb bench train` by its name or yaml file."""
    path = Path(data)
    is_mix = not data or data in MIXES or path.suffix in (".yaml", ".yml") or not (path.suffix or path.exists())
    return mix_histogram(load_mix(data or NO_DATA_MIX), shape) if is_mix else load_histogram(data)


def _check_complete(given: dict[str, str], settings: Sequence[str]) -> None:
    examples = {
        "cluster": "cluster=h200 (a device) or a yaml file",
        "gpus": "gpus=512",
    }
    for name, example in examples.items():
        if name not in given:
            raise ValueError(f"rb plan needs {name}; write {example}")
    if "model" not in given and not any(word.startswith("experiment=") for word in settings):
        raise ValueError(
            "rb plan needs a model; write model=robobrain20_32b, a folder with config.json, or experiment="
        )


def _model(name: str) -> tuple[RoboBrainShape | None, list[str]]:
    """The shape of a folder, or the setting that names a model of conf/."""
    if not name:
        return None, []
    if name in group_choices("model"):
        return shape_of(load_config([f"model={name}"]).model.hf_path), [f"model={name}"]
    if absent_name(name) or Path(name).exists():
        return shape_of(name), [f"model.hf_path={name}"]
    raise ValueError(
        f"model '{name}' is neither in conf/model ({', '.join(group_choices('model'))}) nor a folder with config.json"
    )


def read_bytes(text: str) -> float:
    """`80e9`, `80GB` or `74.5GiB`.

    Raises:
        ValueError: it is no size.
    """
    found = SIZE.fullmatch(text.strip())
    unit = UNITS.get(found[2].lower()) if found is not None else None
    if found is None or unit is None or found[1].count(".") > 1:
        raise ValueError(f"max_gpu_memory '{text}' is no size; write 80e9, 80GB or 74.5GiB")
    size = float(found[1]) * unit
    if not 0 < size < math.inf:
        raise ValueError(f"max_gpu_memory is {text}; it must be above 0")
    return size


def _whole(name: str, text: str) -> int:
    if name == "sequence_parallel":
        return _switch(name, text)
    try:
        value = int(text)
    except ValueError as error:
        raise ValueError(f"{name} must be a whole number, got '{text}'") from error
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1")
    return value


def _switch(name: str, text: str) -> int:
    values = {"true": 1, "1": 1, "false": 0, "0": 0}
    if text.lower() not in values:
        raise ValueError(f"{name} must be true or false, got '{text}'")
    return values[text.lower()]
