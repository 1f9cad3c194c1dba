"""`checkpoint.json`: what a checkpoint folder says of itself, and how complete checkpoints are told from others."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from megatron_rb.shapes.foreign import foreign_kind

FORMAT = 1
MANIFEST = "checkpoint.json"
COMPLETE = re.compile(r"step_(\d{8,})$")
RESEED = "reseed"
"""Key of a manifest whose random states belong to another kind of device: a run continues with new ones."""
SIDE_FOLDER = "hf"
"""Where a checkpoint, or a folder of checkpoints, keeps config, tokenizer and processor of its model."""


def is_checkpoint(folder: str | Path) -> bool:
    """Whether the folder is a complete training checkpoint."""
    name = Path(folder).name
    return (Path(folder) / MANIFEST).is_file() and ".writing-" not in name and not name.endswith(".partial")


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Step, model, layout and platform of a checkpoint folder."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} is not a checkpoint: it has no {MANIFEST}")
    manifest = json.loads(path.read_text())
    if manifest["format"] != FORMAT:
        raise ValueError(f"{folder} has checkpoint format {manifest['format']}, this version reads format {FORMAT}")
    return manifest


def holds_adapters(manifest: dict[str, Any]) -> bool:
    """Whether a checkpoint is one of adapters, whose base weights lie elsewhere."""
    return bool(manifest["model"].get("adapters"))


def check_same_model(manifest: dict[str, Any], model: Any, folder: str | Path) -> None:
    """Raise ValueError that names what differs when a checkpoint is of another model, or of other adapters."""
    if holds_adapters(manifest) != bool(model.get("adapters")):
        kinds = ("adapters alone", "whole weights")
        there, here = kinds if holds_adapters(manifest) else reversed(kinds)
        raise ValueError(
            f"{folder} is a checkpoint of {there}, and what is to be loaded is {here}; leave model.adapters as the run "
            "that saved it had it, or choose another run_dir"
        )
    if holds_adapters(manifest) and manifest["model"]["base"] != model["base"]:
        raise ValueError(
            f"{folder} holds adapters of other base weights ({manifest.get('base_folder')}, digest "
            f"{manifest['model']['base']}) than these (digest {model['base']}); name that folder in checkpoint.init or "
            "model.hf_path"
        )
    theirs, ours = _flat(manifest["model"]), _flat(as_json(dict(model)))
    different = [key for key in sorted(theirs.keys() | ours.keys()) if theirs.get(key) != ours.get(key)]
    if different:
        listed = "; ".join(f"{key} is {theirs.get(key)} there and {ours.get(key)} here" for key in different)
        raise ValueError(f"{folder} is a checkpoint of another model: {listed}")


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"text": {"num_layers": 4}}` as `{"text.num_layers": 4}`, so that a message names what differs and no more."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def complete_steps(folder: Path) -> set[int]:
    """Steps of the complete checkpoints in a folder, which may be absent."""
    if not folder.is_dir():
        return set()
    matches = (COMPLETE.match(entry.name) for entry in folder.iterdir() if entry.is_dir())
    return {int(match.group(1)) for match in matches if match}


def as_json(value: Any) -> Any:
    """The value as it comes back from a JSON file (tuples become lists)."""
    return json.loads(json.dumps(value))


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint a path names: itself, or the newest complete one in the folder or in its `checkpoints`."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"there is no checkpoint folder {path}")
    if is_checkpoint(path):
        return path
    for folder in (path, path / "checkpoints"):
        steps = complete_steps(folder)
        if steps:
            return folder / f"step_{max(steps):08d}"
    kind = foreign_kind(path)
    if kind:
        raise ValueError(f"{path} {kind}")
    raise ValueError(f"{path} is neither a checkpoint nor a folder with complete ones (step_00000040 and the like)")


def find_side_files(checkpoint: Path, hf: str = "") -> Path:
    """Folder with config, tokenizer and processor: the one asked for, else that of the checkpoint or of its run."""
    if hf:
        return Path(hf)
    for folder in (checkpoint / SIDE_FOLDER, checkpoint.parent / SIDE_FOLDER):
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(f"{checkpoint} comes without config and tokenizer files; name their Hugging Face folder with --hf")
