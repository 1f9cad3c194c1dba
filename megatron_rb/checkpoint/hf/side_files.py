"""What a Hugging Face folder holds beside its weights: config, tokenizer, processor, chat templates."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path

import torch

from megatron_rb.checkpoint.hf.quantised import plain_config, quantisation

WEIGHT_FILES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".h5")
TEMPLATE_FOLDER = "additional_chat_templates"
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def copy_side_files(hf_path: str | Path, target: str | Path) -> None:
    """Copy everything but weights; a target that has a config.json already is left as it is.

    A config.json loses its statements of quantisation: what this stack writes is not quantised.
    """
    source, target = Path(hf_path), Path(target)
    if (target / "config.json").is_file():
        return
    if not (source / "config.json").is_file():
        raise ValueError(f"{source} has no config.json; name a Hugging Face folder")
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: (path.name == "config.json", path.name)):  # config.json last
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(WEIGHT_FILES):
            _copy_config(path, target) if path.name == "config.json" else shutil.copyfile(path, target / path.name)
    if (source / TEMPLATE_FOLDER).is_dir():
        shutil.copytree(source / TEMPLATE_FOLDER, target / TEMPLATE_FOLDER, dirs_exist_ok=True)


def _copy_config(source: Path, target: Path) -> None:
    config = json.loads(source.read_text())
    if quantisation(config) is None:
        shutil.copyfile(source, target / source.name)
    else:
        (target / source.name).write_text(json.dumps(plain_config(config), indent=2) + "\n")


def write_config(source: Path, target: Path, dtypes: Collection[torch.dtype]) -> None:
    """Copy a config.json; where all weights have one type, its statements of the type are set to it."""
    config = plain_config(json.loads(source.read_text()))
    if len(dtypes) == 1:
        name = DTYPE_NAMES[next(iter(dtypes))]
        keys = ("dtype", "torch_dtype")
        for section in (config, *(part for part in config.values() if isinstance(part, dict))):
            section.update({key: name for key in keys if key in section})
        if not any(key in config for key in keys):
            config["torch_dtype"] = name  # all releases of transformers read this word
    target.write_text(json.dumps(config, indent=2) + "\n")
