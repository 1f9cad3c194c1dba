"""Whether a stored copy of a tied embedding is one, by its values."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_rb.checkpoint.storage.tensors import FilePool, StoredTensor, as_bytes, row_blocks


def check_tied(folder: Path, embedding: StoredTensor, head: StoredTensor | None, pool: FilePool) -> None:
    """Compare the two, whatever their types; None = no copy is stored.

    Raises:
        ValueError: they differ.
    """
    if head is not None and not _equal_values(embedding, head, pool):
        raise ValueError(
            f"{folder} says tie_word_embeddings, but its {head.name} is not {embedding.name}; "
            "set tie_word_embeddings to false in its config.json if the head is its own"
        )


def _equal_values(a: StoredTensor, b: StoredTensor, pool: FilePool) -> bool:
    if a.shape != b.shape:
        return False
    wide = torch.promote_types(a.dtype, b.dtype)
    for start, count in row_blocks(a.num_rows, max(a.row_bytes, b.row_bytes)):
        x, y = (_rows(tensor, start, count, pool).to(wide) for tensor in (a, b))
        if not torch.equal(x, y) and not bool(((x == y) | (x.isnan() & y.isnan())).all()):
            return False
    return True


def _rows(tensor: StoredTensor, start: int, count: int, pool: FilePool) -> torch.Tensor:
    rows = torch.empty((count, *tensor.shape[1:]), dtype=tensor.dtype)
    pool.read_rows(tensor, start, count, as_bytes(rows).data)
    return rows
