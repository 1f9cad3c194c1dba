"""The tensors of a Hugging Face folder and their match with the weight table, found without loading anything."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rb.checkpoint.hf.names import canonical_name
from megatron_rb.checkpoint.hf.non_parameters import ASKED_FOR, check_patterns, is_allowed, non_parameter
from megatron_rb.checkpoint.hf.quantised import with_values
from megatron_rb.checkpoint.hf.table import stored_rules
from megatron_rb.checkpoint.storage.restricted import read_torch_file
from megatron_rb.checkpoint.storage.safetensors_files import read_safetensors
from megatron_rb.checkpoint.storage.tensors import StoredTensor
from megatron_rb.shapes.foreign import foreign_kind, is_adapter
from megatron_rb.shapes.linears import TEXT
from megatron_rb.shapes.shape import RoboBrainShape

SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_NUMBERED = re.compile(r"(?:model|pytorch_model)-(\d+)-of-(\d+)\.(safetensors|bin)")
EMBEDDING, HEAD = f"{TEXT}.embed_tokens.weight", "lm_head.weight"
LISTED = 3
"""Names given in an error before the rest is counted."""


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder by its name in the file; safetensors are preferred to `.bin` files.

    Raises:
        ValueError: there are no weights, a file is missing or damaged, two files hold one tensor, or weights are
            quantised in a way that is not read.
    """
    if is_adapter(folder):
        raise ValueError(f"{folder} {foreign_kind(folder)}")
    return with_values(folder, _stored_tensors(folder))


def _stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    for single, index in (SAFETENSORS, PICKLED):
        if (folder / index).is_file():
            return _indexed(folder, index)
        if (folder / single).is_file():
            return _read(folder / single)
        numbered = _numbered(folder, Path(single).suffix)
        if numbered:
            return _merged(folder, numbered)
    kind = foreign_kind(folder)
    if kind:
        raise ValueError(f"{folder} {kind}")
    raise ValueError(f"{folder} has no weights: neither {', '.join(SAFETENSORS)} nor {', '.join(PICKLED)}")


def _numbered(folder: Path, suffix: str) -> list[str]:
    """The files of a set such as `model-00001-of-00002.safetensors` that lies there without an index.

    Raises:
        ValueError: the set is not complete, or there are several.
    """
    matches = [m for m in map(_NUMBERED.fullmatch, sorted(os.listdir(folder))) if m and suffix == f".{m[3]}"]
    sets = {(match[0].split("-")[0], match[2]) for match in matches}
    if len(sets) > 1:
        named = ", ".join(sorted(f"{kind}-*-of-{count}{suffix}" for kind, count in sets))
        raise ValueError(f"{folder} holds the shards of several sets ({named}) and no index; keep those of one model")
    absent = set(range(1, int(matches[0][2]) + 1)) - {int(match[1]) for match in matches} if matches else set()
    if absent:
        numbers = ", ".join(map(str, sorted(absent)))
        raise ValueError(
            f"{folder} has no index, and of its {int(matches[0][2])} shards number {numbers} is missing; "
            "fetch the whole folder"
        )
    return [match[0] for match in matches]


def _merged(folder: Path, files: Sequence[str]) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in _read(folder / file).items():
            if name in found:
                other = next(iter(found[name].paths)).name
                raise ValueError(f"{folder}: {name} lies in {other} and in {file}; one of the shards is a stranger")
            found[name] = tensor
    return found


def _indexed(folder: Path, index: str) -> dict[str, StoredTensor]:
    places: dict[str, str] = json.loads((folder / index).read_text())["weight_map"]
    files = sorted(set(places.values()))
    absent = [file for file in files if not (folder / file).is_file()]
    if absent:
        raise ValueError(f"{folder} lacks {', '.join(absent)}, which its index names; fetch the whole folder")
    found = _merged(folder, files)
    lost = sorted(name for name, file in places.items() if name not in found or file != _file(found[name]))
    if lost:
        raise ValueError(
            f"{folder}: {len(lost)} tensors do not lie where {index} says, e.g. {lost[0]} is not in {places[lost[0]]}; "
            "a shard is of another checkpoint"
        )
    return found


def _file(tensor: StoredTensor) -> str:
    return next(iter(tensor.paths)).name


def _read(path: Path) -> dict[str, StoredTensor]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    tree = read_torch_file(path).tree
    if not isinstance(tree, Mapping) or not all(isinstance(value, StoredTensor) for value in tree.values()):
        raise ValueError(f"{path} is no state dict: not everything in it is a tensor")
    return {name: StoredTensor(name, value.dtype, value.shape, value.chunks) for name, value in tree.items()}


@dataclass(frozen=True)
class Matched:
    """The tensors of a model in a folder."""

    tensors: dict[str, StoredTensor]
    """By canonical name; each has the shape that the model's config.json asks for."""
    head_copy: StoredTensor | None
    """With tied embeddings: a stored copy of the embedding as `lm_head.weight`, which must be equal to it."""
    dropped: dict[str, str]
    """Tensors of the folder that are left out, with the reason."""


def match_tensors(
    folder: Path, found: Mapping[str, StoredTensor], shape: RoboBrainShape, allow_drop: Collection[str] = ()
) -> Matched:
    """Give every tensor its place in the model.

    Args:
        allow_drop: names, as in the files, or patterns of names that may be left out.

    Raises:
        ValueError: a tensor is missing, is not part of the model, or has another shape than config.json says.
    """
    wanted = _wanted(shape)
    tensors: dict[str, StoredTensor] = {}
    dropped: dict[str, str] = {}
    head, others = None, []
    for name, tensor in found.items():
        canonical = canonical_name(name)
        if canonical in tensors:
            raise ValueError(f"{folder} holds {canonical} twice: as {tensors[canonical].name} and as {name}")
        if canonical in wanted:
            tensors[canonical] = tensor
        elif canonical == HEAD and shape.text.tied_embeddings:
            head = tensor
        else:
            others.append(name)
    check_patterns(allow_drop, others, [tensor.name for tensor in tensors.values()], folder)
    for name in others:
        reason = non_parameter(name) or (ASKED_FOR if is_allowed(name, allow_drop) else None)
        dropped |= {name: reason} if reason else {}
    if head is not None and EMBEDDING not in tensors:
        tensors[EMBEDDING], head = head, None  # tied: either name is that of both
    elif head is not None:
        dropped[head.name] = "a copy of the tied embedding"
    missing = sorted(wanted.keys() - tensors.keys())
    unknown = [name for name in others if name not in dropped]
    if missing or unknown:
        raise ValueError(_disagreement(folder, missing, unknown, wanted))
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name]:
            raise ValueError(
                f"{tensor.name} has the shape {list(tensor.shape)} in {_file(tensor)} of {folder}; "
                f"its config.json says {list(wanted[name])}"
            )
    return Matched(tensors, head, dropped)


def _wanted(shape: RoboBrainShape) -> dict[str, tuple[int, ...]]:
    return {n: s for rule in stored_rules(shape).values() for n, s in zip(rule.hf_names, rule.hf_shapes, strict=True)}


def _disagreement(folder: Path, missing: list[str], unknown: list[str], wanted: Collection[str]) -> str:
    parts = []
    if missing:
        parts.append(f"{len(missing)} tensors are missing ({_listed(missing)})")
    if unknown:
        parts.append(
            f"{len(unknown)} are not part of it ({_listed([_with_nearest(name, wanted) for name in unknown])})"
        )
    hint = "; leave tensors out with --allow-drop, by name or by a pattern such as '*.name'"
    way_out = hint if unknown and not missing else ""
    return f"{folder} does not hold the model of its config.json: {' and '.join(parts)}{way_out}"


def _with_nearest(name: str, wanted: Collection[str]) -> str:
    close = difflib.get_close_matches(canonical_name(name), wanted, n=1)
    return f"{name}, nearest known is {close[0]}" if close else name


def _listed(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
