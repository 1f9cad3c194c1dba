"""Where every parameter of the model lies in a legacy tree: stage, chunk and key, with global layer numbers."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_rb.checkpoint.hf.non_parameters import ASKED_FOR, check_patterns, is_allowed, non_parameter
from megatron_rb.checkpoint.legacy.names import VISION, LegacyParameter, legacy_parameter
from megatron_rb.checkpoint.legacy.tree import LegacyTree, RankCheckpoint
from megatron_rb.checkpoint.storage.tensors import StoredTensor

Dropped = list[tuple[str, str]]
"""`(key, reason)` of what is left out."""
_OTHER_SPLITS = (
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "pipeline_model_parallel_layout",
)
"""Arguments that shift layers between stages; the layers that are there are believed then."""


@dataclass(frozen=True)
class Site:
    """One native parameter in the files of a pipeline stage, the same on every tensor-parallel rank."""

    native: str
    parameter: LegacyParameter
    pp_rank: int
    chunk: int
    key: str

    def parts(self, tree: LegacyTree) -> list[StoredTensor]:
        """What each tensor-parallel rank holds."""
        return [rank.chunks[self.chunk][self.key] for rank in tree.stage(self.pp_rank)]

    def describe(self, tree: LegacyTree, tp_rank: int = 0) -> str:
        rank = tree.ranks[tp_rank, self.pp_rank]
        return f"{rank.file.path}: {rank.chunk_name(self.chunk)}/{self.key}"


def find_sites(tree: LegacyTree, allow_drop: Collection[str] = ()) -> tuple[list[Site], Dropped]:
    """Sites of all parameters in the order of the model's own state dict, and the keys that are left out.

    Raises:
        ValueError: a key is unknown (and not in `allow_drop`), layers are not numbered from 0 in each chunk, or
            ranks of one stage hold different keys.
    """
    dropped: Dropped = []
    found: dict[tuple[int, int], list[tuple[str, LegacyParameter]]] = {}
    for pp_rank in range(tree.pp_size):
        _check_same_keys(tree.stage(pp_rank))
        rank = tree.ranks[0, pp_rank]
        for chunk, content in enumerate(rank.chunks):
            found[pp_rank, chunk] = _parameters(rank, chunk, content, allow_drop, dropped)
    keys = {key for rank in tree.ranks.values() for chunk in rank.chunks for key in chunk}
    known = {key for key in keys if legacy_parameter(key)}
    check_patterns(allow_drop, keys - known, known, tree.folder)
    firsts = _first_layers(tree, found)
    sites = [
        Site(it.global_name(firsts[pp_rank, chunk] if it.is_text_layer else 0), it, pp_rank, chunk, key)
        for (pp_rank, chunk), parameters in found.items()
        for key, it in parameters
    ]
    _check_stages(tree, sites)
    return sites, dropped


def _parameters(
    rank: RankCheckpoint, chunk: int, content: Mapping[str, Any], allow_drop: Collection[str], dropped: Dropped
) -> list[tuple[str, LegacyParameter]]:
    parameters = []
    for key, value in content.items():
        full = f"stage {rank.pp_rank}, {rank.chunk_name(chunk)}: {key}"
        found = legacy_parameter(key)
        reason = non_parameter(key) or (ASKED_FOR if found is None and is_allowed(key, allow_drop) else None)
        if reason:
            dropped.append((full, reason))
        elif found is None:
            raise ValueError(_unknown(rank, key))
        elif value is None:
            dropped.append((full, "it holds nothing"))
        elif not isinstance(value, StoredTensor):
            raise ValueError(
                f"{rank.file.path}: {key} is {value!r} and no plain tensor; fp8 parameters are not read, save the "
                "checkpoint with bf16 parameters"
            )
        else:
            _check_type(rank, key, value)
            parameters.append((key, found))
    return parameters


def _check_type(rank: RankCheckpoint, key: str, value: StoredTensor) -> None:
    if not value.dtype.is_floating_point or value.dtype.itemsize < 2:
        raise ValueError(
            f"{rank.file.path}: {key} is of type {value.dtype}; fp8 and integer parameters are not read, save the "
            "checkpoint with bf16 parameters"
        )


def _unknown(rank: RankCheckpoint, key: str) -> str:
    known = [name for chunk in rank.chunks for name in chunk if legacy_parameter(name)]
    near = difflib.get_close_matches(key, known, 1)
    hint = f"the nearest known one is {near[0]}" if near else "no known one is near"
    return (
        f"{rank.file.path} holds {key}, which no Qwen2.5-VL has ({hint}); use --allow-drop {key} to leave it out, or "
        "convert with the tool of the stack that wrote it"
    )


def _check_same_keys(stage: list[RankCheckpoint]) -> None:
    for rank in stage[1:]:
        for chunk, content in enumerate(rank.chunks):
            differing = sorted(content.keys() ^ stage[0].chunks[chunk].keys())
            if differing:
                raise ValueError(
                    f"{rank.file.path} and {stage[0].file.path} hold different parameters "
                    f"({', '.join(differing[:3])}): "
                    "they are of different checkpoints"
                )
            for key, value in content.items():
                first = stage[0].chunks[chunk][key]
                kinds = [(one.dtype, one.shape) if isinstance(one, StoredTensor) else None for one in (value, first)]
                if kinds[0] != kinds[1] and legacy_parameter(key):
                    raise ValueError(
                        f"{rank.file.path} and {stage[0].file.path} hold {key} as {kinds[0]} and {kinds[1]}: they "
                        "are of "
                        "different checkpoints"
                    )


def _first_layers(
    tree: LegacyTree, found: Mapping[tuple[int, int], list[tuple[str, LegacyParameter]]]
) -> dict[tuple[int, int], int]:
    """Global number of the first text layer of every stage and chunk: chunk 0 of all stages, then chunk 1, ..."""
    firsts, total = {}, 0
    for chunk in range(tree.num_chunks):
        for pp_rank in range(tree.pp_size):
            rank = tree.ranks[0, pp_rank]
            parameters = found[pp_rank, chunk]
            layers = {it.layer or 0 for _, it in parameters if it.is_text_layer}
            if layers != set(range(len(layers))):
                raise ValueError(
                    f"{rank.file.path}: {rank.chunk_name(chunk)} holds the layers {sorted(layers)}; "
                    "they should be numbered from 0 within each stage and chunk"
                )
            _check_count(rank, chunk, len(layers))
            firsts[pp_rank, chunk] = total
            total += len(layers)
    return firsts


def _check_count(rank: RankCheckpoint, chunk: int, count: int) -> None:
    """Compare with what the training arguments say about this stage."""
    args, chunks = rank.args, len(rank.chunks)
    per_chunk = args.get("num_layers_per_virtual_pipeline_stage")
    first, last = (args.get(f"decoder_{side}_pipeline_num_layers") for side in ("first", "last"))
    expected = None if any(args.get(name) for name in _OTHER_SPLITS) else per_chunk
    if rank.pp_rank == 0 and first:
        expected = first // chunks
    elif last and rank.pp_rank == args.get("pipeline_model_parallel_size", 0) - 1:
        expected = last // chunks
    elif first or last:
        expected = None
    if expected and count != expected:
        raise ValueError(
            f"{rank.file.path}: {rank.chunk_name(chunk)} holds {count} layers, its arguments give this stage "
            f"{expected}; "
            "the file is of another checkpoint"
        )


def _check_stages(tree: LegacyTree, sites: list[Site]) -> None:
    seen: dict[str, Site] = {}
    for site in sites:
        if site.key.startswith(VISION) and (site.pp_rank, site.chunk) != (0, 0):
            raise ValueError(f"{site.describe(tree)} lies outside the first stage, where the whole ViT should be")
        if site.native in seen:
            raise ValueError(f"{site.native} is there twice: {seen[site.native].describe(tree)}, {site.describe(tree)}")
        seen[site.native] = site
