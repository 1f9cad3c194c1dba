"""Names folders that hold a model in another form than the one asked for, and says what to do with them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_FILES = (ADAPTER_CONFIG, "adapter_model.safetensors", "adapter_model.bin")
_OWN_CHECKPOINT = "checkpoint.json"
_ZERO = ("zero_to_fp32.py", "zero_pp_rank_*", "*/zero_pp_rank_*", "*/*_zero_pp_rank_*")


def foreign_kind(path: str | Path) -> str | None:
    """What a folder is and the way to use it, as the rest of a sentence that begins with the folder.

    None for checkpoints of this stack, Hugging Face folders of whole weights, and what is not known.
    """
    folder = Path(path)
    if not folder.is_dir() or (folder / _OWN_CHECKPOINT).is_file():
        return None
    if is_adapter(folder):
        return _adapter_words(folder)
    if is_megatron_dist(folder):
        return f"is a distributed Megatron checkpoint (torch_dist); {_convert(folder)}"
    if any(any(place.glob("mp_rank_*")) for place in _iterations(folder)):
        return f"is a legacy Megatron checkpoint; {_convert(folder)}"
    if any(any(folder.glob(pattern)) for pattern in _ZERO):
        return (
            "holds DeepSpeed ZeRO shards; make whole weights of them with the zero_to_fp32.py beside them, and add the "
            "config.json of the model"
        )
    if any(folder.glob("*.gguf")):
        return "holds GGUF files; name the Hugging Face folder they were made from"
    return None


def check_init(path: str) -> None:
    """Raise ValueError when a run's first weights (`checkpoint.init`) are none that it reads; a folder that is not
    there yet is not looked at."""
    kind = foreign_kind(path)
    if kind:
        raise ValueError(f"checkpoint.init: {path} {kind}")
    folder = Path(path)
    if not folder.exists() or any((folder / name).is_file() for name in (_OWN_CHECKPOINT, "config.json")):
        return
    own = [
        place for pattern in ("step_*", "checkpoints/step_*") for place in folder.glob(f"{pattern}/{_OWN_CHECKPOINT}")
    ]
    complete = [file.parent for file in own if file.parent.name.removeprefix("step_").isdigit()]
    if complete:
        newest = max(complete, key=lambda place: int(place.name.removeprefix("step_")))
        raise ValueError(
            f"checkpoint.init: {path} is the folder of a run, whose weights change; name one of its checkpoints, the "
            f"newest is {newest}"
        )
    raise ValueError(no_first_weights(path))


def no_first_weights(path: str) -> str:
    """What is wrong with a folder that is neither form of weights."""
    return (
        f"checkpoint.init '{path}' is neither a checkpoint nor a Hugging Face folder; give one of them, or "
        f"checkpoint.init=random for fresh weights"
    )


def is_adapter(folder: Path) -> bool:
    """Whether a folder is what PEFT saves of a LoRA or another adapter."""
    return any((folder / name).is_file() for name in _ADAPTER_FILES)


def adapter_settings(folder: Path) -> dict[str, Any]:
    """PEFT's description of an adapter; empty when there is none."""
    path = folder / ADAPTER_CONFIG
    return json.loads(path.read_text()) if path.is_file() else {}


def is_megatron_dist(folder: Path) -> bool:
    """Whether a folder or one of its iterations is a `torch_dist` checkpoint, of another stack than this one."""
    return any(is_dist_iteration(place) for place in _iterations(folder))


def is_dist_iteration(folder: Path) -> bool:
    """Whether a folder itself is one."""
    return (folder / ".metadata").is_file() and not (folder / _OWN_CHECKPOINT).is_file()


def _iterations(folder: Path) -> Iterable[Path]:
    return [folder, *folder.glob("iter_*"), folder / "release"]


def _adapter_words(folder: Path) -> str:
    settings = adapter_settings(folder)
    base = settings.get("base_model_name_or_path")
    of = f" of {base}" if base else ""
    return (
        f"holds a {settings.get('peft_type') or 'LoRA'} adapter{of} and not the model's own weights; merge it into its "
        f"base model with: rb convert merge --base DIR --adapter {folder} --out DIR, and name the merged folder"
    )


def _convert(folder: Path) -> str:
    return f"make a checkpoint of it with: rb convert from-megatron --ckpt {folder} --hf DIR --out DIR"
