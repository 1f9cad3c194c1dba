"""Puts the tensor-parallel parts of a legacy checkpoint together, as mosaics of the ranks' files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from megatron_rb.checkpoint.hf.table import EMBEDDING, HEAD
from megatron_rb.checkpoint.legacy.layers import Site
from megatron_rb.checkpoint.legacy.names import Cut
from megatron_rb.checkpoint.legacy.reading import Reading
from megatron_rb.checkpoint.storage.mosaic import cropped, joined, reshaped
from megatron_rb.checkpoint.storage.tensors import FilePool, StoredTensor, row_blocks


def join_weights(reading: Reading) -> dict[str, StoredTensor]:
    """Every weight of the model by native name, global and unpadded.

    Raises:
        ValueError: one is missing, has another shape than the model, or copies that must be equal differ.
    """
    weights: dict[str, StoredTensor] = {}
    for site in reading.sites:
        parts = site.parts(reading.tree)
        whole = join_parts(reading, site, parts)
        _check_copies(reading, site, parts)
        _check_padding(reading, site, parts, whole)
        weights[site.native] = whole
    missing = sorted(reading.table.keys() - weights.keys())
    if missing:
        raise ValueError(
            f"{reading.tree.folder} lacks {len(missing)} parameters of the model of config.json: "
            f"{', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}; give the config.json of the model that was "
            "trained"
        )
    if reading.tied and HEAD in weights:
        head, embedding = weights.pop(HEAD), weights[EMBEDDING]
        if differs(reading.pool, head, embedding):
            raise ValueError(
                f"{reading.tree.folder}: the last stage's output_layer.weight differs from the embedding of the first, "
                "but config.json ties them; give the config.json of the model that was trained"
            )
        reading.dropped.append(("language_model.output_layer.weight", "tied: the same bytes as the embedding"))
    return weights


def join_parts(reading: Reading, site: Site, parts: Sequence[StoredTensor]) -> StoredTensor:
    """One global tensor from what each tensor-parallel rank holds, padding left out.

    Raises:
        ValueError: the parts do not make up the shape.
    """
    shape, tree = reading.shape(site), reading.tree
    try:
        return _JOINS[site.parameter.cut](site.native, parts, shape)
    except ValueError as error:
        raise ValueError(
            f"{site.describe(tree)} has the shape {parts[0].shape} on each of {tree.tp_size} tensor-parallel "
            "ranks, which "
            f"does not make {shape} of {site.native}; config.json is of another model ({error})"
        ) from error


def _whole(name: str, parts: Sequence[StoredTensor], shape: tuple[int, ...]) -> StoredTensor:
    tensor = reshaped(parts[0], shape)
    return StoredTensor(name, tensor.dtype, shape, tensor.chunks)


def _rows(name: str, parts: Sequence[StoredTensor], shape: tuple[int, ...]) -> StoredTensor:
    rows = parts[0].shape[0]
    return joined(name, shape, [(part, (rank * rows, *_zeros(shape))) for rank, part in enumerate(parts)])


def _vocabulary(name: str, parts: Sequence[StoredTensor], shape: tuple[int, ...]) -> StoredTensor:
    rows = parts[0].shape[0]
    return joined(name, shape, _cut_rows(parts, 0, rows, shape[0], 0))


def _gated(name: str, parts: Sequence[StoredTensor], shape: tuple[int, ...]) -> StoredTensor:
    rows, wanted = parts[0].shape[0] // 2, shape[0] // 2
    gate = _cut_rows(parts, 0, rows, wanted, 0)
    up = _cut_rows(parts, rows, rows, wanted, wanted)
    return joined(name, shape, [*gate, *up])


def _columns(name: str, parts: Sequence[StoredTensor], shape: tuple[int, ...]) -> StoredTensor:
    width, pieces = parts[0].shape[1], []
    for rank, part in enumerate(parts):
        kept = min(width, shape[1] - rank * width)
        if kept > 0:
            pieces.append((cropped(part, (0, 0), (part.shape[0], kept)), (0, rank * width)))
    return joined(name, shape, pieces)


_JOINS = {
    Cut.WHOLE: _whole,
    Cut.ROWS: _rows,
    Cut.VOCABULARY: _vocabulary,
    Cut.GATED: _gated,
    Cut.COLUMNS: _columns,
}


def _cut_rows(
    parts: Sequence[StoredTensor], start: int, rows: int, wanted: int, offset: int
) -> list[tuple[StoredTensor, tuple[int, ...]]]:
    """Rows `start` to `start + rows` of each part below each other from row `offset` on, `wanted` of them in all."""
    pieces = []
    for rank, part in enumerate(parts):
        kept = min(rows, wanted - rank * rows)
        if kept > 0:
            zeros = _zeros(part.shape)
            pieces.append((cropped(part, (start, *zeros), (kept, *part.shape[1:])), (offset + rank * rows, *zeros)))
    return pieces


def _zeros(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (0,) * (len(shape) - 1)


def _check_copies(reading: Reading, site: Site, parts: Sequence[StoredTensor]) -> None:
    if site.parameter.cut is not Cut.WHOLE:
        return
    tree = reading.tree
    for tp_rank, part in enumerate(parts[1:], start=1):
        if differs(reading.pool, parts[0], part):
            raise ValueError(
                f"{site.describe(tree, tp_rank)} differs from the copy in {tree.ranks[0, site.pp_rank].file.path}, but "
                "tensor parallelism keeps them equal: the files are of different checkpoints, or training went astray"
            )


def _check_padding(reading: Reading, site: Site, parts: Sequence[StoredTensor], whole: StoredTensor) -> None:
    """Padding of the vocabulary takes no part in the model; that of a gated MLP does not as long as it is zero."""
    cut = site.parameter.cut
    dim = 1 if cut is Cut.COLUMNS else 0
    held = sum(part.shape[dim] for part in parts) if cut is not Cut.WHOLE else whole.shape[0]
    if held == whole.shape[dim]:
        return
    what = f"{held - whole.shape[dim]} {'columns' if dim else 'rows'} of padding"
    reading.dropped.append((f"stage {site.pp_rank}: {site.key}", f"{what} beyond the sizes of config.json"))
    if cut is not Cut.GATED:
        return
    for rank, tail in _gated_padding(parts, whole.shape[0] // 2):
        if any(bool(block.any()) for block in _blocks(reading.pool, tail)):
            raise ValueError(
                f"{site.describe(reading.tree, rank)} has {what} that is not zero, so leaving it out would change the "
                "model; config.json is of another model"
            )


def _gated_padding(parts: Sequence[StoredTensor], wanted: int) -> Iterator[tuple[int, StoredTensor]]:
    for rank, part in enumerate(parts):
        rows = part.shape[0] // 2
        kept = max(0, min(rows, wanted - rank * rows))
        for start in (kept, rows + kept):
            yield rank, cropped(part, (start, *_zeros(part.shape)), (rows - kept, *part.shape[1:]))


def differs(pool: FilePool, a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tensors of a shape differ in any byte."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return True
    return any(not torch.equal(x, y) for x, y in zip(_blocks(pool, a), _blocks(pool, b), strict=True))


def _blocks(pool: FilePool, tensor: StoredTensor) -> Iterator[torch.Tensor]:
    """The bytes of a tensor, some rows at a time."""
    for start, count in row_blocks(tensor.num_rows, tensor.row_bytes):
        block = torch.empty(count * tensor.row_bytes, dtype=torch.uint8)
        if len(block):
            pool.read_rows(tensor, start, count, block.numpy().data)
        yield block
