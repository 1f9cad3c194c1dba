"""What is kept of the weights: a hash of each, and some output features of every linear, to compute them again."""

from __future__ import annotations

import numpy as np
import torch

from megatron_rb.capture.columns import LocalColumns
from megatron_rb.capture.files import RankFile
from megatron_rb.checkpoint.storage.checksum import checksum
from megatron_rb.models.build import named_parameters, weight_key
from megatron_rb.models.stage import RoboBrainStage
from megatron_rb.parallel.collectives import gather_over
from megatron_rb.parallel.mesh import Mesh
from megatron_rb.parallel.sharding import local_to_full, shard_of

NOT_SLICED = ("language.embedding.", "language.head.output.", "vision.patch_embed.")


def keep_weights(stages: list[RoboBrainStage], file: RankFile, mesh: Mesh, features: int) -> None:
    """Hash every parameter and keep some features; called by every rank, between the passes and the optimizer step."""
    if mesh.dp_rank:
        return
    for name, parameter in named_parameters(stages):
        local, spec = parameter.detach(), shard_of(parameter)
        shards = gather_over(local, mesh.tp_group) if mesh.tp_size > 1 and spec.dim is not None else [local]
        if mesh.tp_rank == 0:
            full = local_to_full([shard.cpu() for shard in shards], spec)
            file.weights[weight_key(name, stages[0].shape)] = {"dtype": str(full.dtype), **_hashes(full)}
        if not name.startswith(NOT_SLICED):
            _keep_slice(file, name, parameter, mesh, features)


def _hashes(full: torch.Tensor) -> dict[str, str]:
    """Of the bytes, and of the bytes rounded to bf16, so that runs in other types can be compared too."""
    rounded = full.to(torch.bfloat16)
    of_rounded = checksum(_bytes(rounded))
    same = full.dtype == torch.bfloat16
    return {"hash": of_rounded if same else checksum(_bytes(full)), "bf16_hash": of_rounded}


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data


def _is_of_norm(name: str) -> bool:
    return "norm" in name.rsplit(".", 2)[-2]


def feature_ids(count: int, features: int) -> np.ndarray:
    """Output features that are kept: spread evenly, so that every head and both halves of a gated MLP have some."""
    return np.unique(np.linspace(0, count - 1, min(count, features)).round().astype(np.int64))


def _keep_slice(file: RankFile, name: str, parameter: torch.nn.Parameter, mesh: Mesh, features: int) -> None:
    local, spec = parameter.detach(), shard_of(parameter)
    if _is_of_norm(name):  # all of it, as one row
        if mesh.tp_rank == 0:
            file.add(f"weight/{name}", local.reshape(1, -1).cpu(), np.zeros(1, dtype=np.int64), None)
        return
    table = local.reshape(local.shape[0], -1)
    ids = feature_ids(spec.full_shape[0], features)
    if spec.dim == 0:
        columns = LocalColumns.of_spec(spec, mesh)
        held = _held_rows(columns, spec.full_shape[0])
        here = np.isin(ids, held[held >= 0])
        places = np.array([int(np.flatnonzero(held == feature)[0]) for feature in ids[here]], dtype=np.int64)
        piece = table.index_select(0, torch.from_numpy(places).to(table.device))
        file.add(f"weight/{name}", piece.cpu(), ids[here], None)
        return
    if spec.dim is None and mesh.tp_rank:
        return
    piece = table.index_select(0, torch.from_numpy(ids).to(table.device))
    columns = LocalColumns.of_spec(spec, mesh)
    file.add(f"weight/{name}", columns.cut(piece).cpu(), ids, columns.ranges)


def _held_rows(columns: LocalColumns, count: int) -> np.ndarray:
    """The global row of each local row; -1 for padding."""
    if columns.ranges is None:
        return np.arange(count)
    end = max(start + length for start, length in columns.local) if columns.local else 0
    held = np.full(end, -1)
    for (first, length), (start, _) in zip(columns.ranges, columns.local, strict=True):
        held[start : start + length] = np.arange(first, first + length)
    return held
