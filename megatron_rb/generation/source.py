"""What answers come from, so that those of two models, or of two ways to compute one, are never mixed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_rb.checkpoint.hf.side_files import WEIGHT_FILES
from megatron_rb.config.schema import Config, DataConfig
from megatron_rb.generation.spec import Sampling
from megatron_rb.platform import get_platform

PROMPT = (
    "tokenizer",
    "chat_template",
    "system_prompt",
    "box_text",
    "min_pixels",
    "max_pixels",
    "video_fps",
    "max_video_frames",
)
"""Settings of `data` that a question is asked by."""


def source_of_stack(
    weights: Path, tokenizer: Path, config: Config, sampling: Sampling, max_new_tokens: int
) -> dict[str, Any]:
    """What answers of this stack depend on; layout, batch and number of processes change none.

    Args:
        weights: checkpoint or Hugging Face folder.
        tokenizer: folder of config.json, tokenizer and processor.
    """
    return {
        **_asked(weights, tokenizer, config.data, max_new_tokens),
        "sampling": asdict(sampling),
        "platform": get_platform(config.platform.name).name,
        "dtype": config.model.dtype,
        "layers": config.model.layers,
        "kernels": asdict(config.kernels),
        "tf32": config.platform.tf32,
    }


def source_of_transformers(folder: Path, settings: DataConfig, max_new_tokens: int) -> dict[str, Any]:
    """What answers of transformers depend on."""
    return {**_asked(folder, folder, settings, max_new_tokens), "sampling": "greedy"}


def _asked(weights: Path, tokenizer: Path, settings: DataConfig, max_new_tokens: int) -> dict[str, Any]:
    return {
        "weights": str(weights.resolve()),
        "weights_digest": weights_digest(weights),
        "tokenizer": str(tokenizer.resolve()),
        "tokenizer_digest": side_files_digest(tokenizer),
        "prompt": {name: getattr(settings, name) for name in PROMPT},
        "max_new_tokens": max_new_tokens,
    }


def weights_digest(folder: Path) -> str:
    """Of names, sizes and times of change of the files that hold tensors: to read them takes too long.

    All files of a checkpoint count, and of a Hugging Face folder the weights alone.
    """
    is_hf = (folder / "config.json").is_file()
    files = (path for path in folder.rglob("*") if path.is_file())
    return _digest(
        {
            str(path.relative_to(folder)): [path.stat().st_size, path.stat().st_mtime_ns]
            for path in files
            if not is_hf or path.name.endswith(WEIGHT_FILES)
        }
    )


def side_files_digest(folder: Path) -> str:
    """Of the content of config.json, tokenizer, processor and templates: all JSON and text files beside the weights."""
    files = [path for path in folder.glob("*") if path.suffix in (".json", ".jinja", ".txt", ".model")]
    kept = [path for path in files if not path.name.endswith(WEIGHT_FILES)]
    return _digest({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in kept})


def _digest(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
