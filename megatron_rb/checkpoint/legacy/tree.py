"""The folders and files of a legacy checkpoint: which ranks wrote it, and whether all files belong together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rb.checkpoint.storage.restricted import Opaque, TorchFile, read_torch_file

TRACKER = "latest_checkpointed_iteration.txt"
MODEL_FILE = "model_optim_rng.pt"
OPTIMIZER_FILE = "distrib_optim.pt"
_RANK_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
_ITERATION_FOLDER = re.compile(r"iter_(\d{7,})")
_CHUNK = re.compile(r"model(\d*)")
_SAME_ON_ALL_RANKS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "padded_vocab_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage",
    "decoder_first_pipeline_num_layers",
    "data_parallel_size",
    "seed",
    "lr",
    "global_batch_size",
    "train_iters",
    "consumed_train_samples",
    "consumed_valid_samples",
)
"""Arguments whose difference shows a file of another run."""


@dataclass(frozen=True)
class RankCheckpoint:
    """What one tensor- and pipeline-parallel rank saved."""

    tp_rank: int
    pp_rank: int
    file: TorchFile
    optimizer_file: TorchFile | None
    """The distributed optimizer's tensors."""
    chunks: tuple[Mapping[str, Any], ...]
    """State dict of every virtual pipeline chunk."""

    @property
    def tree(self) -> Mapping[str, Any]:
        return self.file.tree

    @property
    def args(self) -> Mapping[str, Any]:
        """Training arguments by name; empty when the file has none."""
        args = self.tree.get("args")
        state = args.state if isinstance(args, Opaque) else args
        return state if isinstance(state, Mapping) else {}

    def chunk_name(self, chunk: int) -> str:
        return "model" if len(self.chunks) == 1 and "model" in self.tree else f"model{chunk}"


@dataclass(frozen=True)
class LegacyTree:
    """All files of one iteration, which belong together."""

    folder: Path
    iteration: int
    is_release: bool
    """Converted from elsewhere, not trained yet."""
    tp_size: int
    pp_size: int
    ranks: Mapping[tuple[int, int], RankCheckpoint]
    """By `(tp_rank, pp_rank)`."""

    @property
    def first(self) -> RankCheckpoint:
        return self.ranks[0, 0]

    @property
    def num_chunks(self) -> int:
        """Virtual pipeline chunks of every stage."""
        return len(self.first.chunks)

    def stage(self, pp_rank: int) -> list[RankCheckpoint]:
        """The files of one pipeline stage by tensor-parallel rank."""
        return [self.ranks[tp_rank, pp_rank] for tp_rank in range(self.tp_size)]

    def device_tags(self) -> frozenset[str]:
        files = [file for rank in self.ranks.values() for file in (rank.file, rank.optimizer_file) if file]
        return frozenset().union(*(file.device_tags for file in files))


def is_legacy_checkpoint(path: str | Path) -> bool:
    """Whether the folder, or the iteration that it points to, holds ranks of a legacy checkpoint."""
    folder = Path(path)
    folders = [folder, *(entry for entry in folder.glob("*") if entry.name == "release" or _is_iteration(entry))]
    return any(_RANK_FOLDER.fullmatch(entry.name) for place in folders for entry in place.glob("mp_rank_*"))


def find_iteration(path: str | Path) -> Path:
    """The folder of one iteration: `path` itself, or the one that its tracker file names.

    Raises:
        ValueError: there is none.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; name a legacy checkpoint or one of its iterations")
    if any(folder.glob("mp_rank_*")):
        return folder
    tracker = folder / TRACKER
    if not tracker.is_file():
        found = sorted(entry.name for entry in folder.iterdir() if _is_iteration(entry) or entry.name == "release")
        hint = f"name one of its iterations: {', '.join(found)}" if found else "it is no legacy Megatron checkpoint"
        raise ValueError(f"{folder} has neither mp_rank_* folders nor {TRACKER}; {hint}")
    word = tracker.read_text().strip()
    if word != "release" and not word.isdigit():
        raise ValueError(f"{tracker} holds {word!r}, an iteration or 'release' is expected; name the folder itself")
    chosen = folder / ("release" if word == "release" else f"iter_{int(word):07d}")
    if not chosen.is_dir():
        raise ValueError(f"{tracker} names {chosen.name}, which is missing; name an existing iteration's folder")
    if not any(chosen.glob("mp_rank_*")):
        raise ValueError(f"{chosen} has no mp_rank_* folders: it is no legacy checkpoint")
    return chosen


def read_tree(path: str | Path) -> LegacyTree:
    """Open the files of all ranks; their tensors stay on the disk.

    Raises:
        ValueError: a rank is missing, or a file belongs to another checkpoint or is of another kind.
        UnsafePickle, DamagedFile: a file cannot be read.
    """
    folder = find_iteration(path)
    places = _rank_folders(folder)
    ranks = {rank: _read_rank(rank, place) for rank, place in sorted(places.items())}
    tp_size, pp_size = (max(rank[axis] for rank in ranks) + 1 for axis in (0, 1))
    tree = LegacyTree(folder, _iteration(folder, ranks), folder.name == "release", tp_size, pp_size, ranks)
    _check_together(tree)
    return tree


def _is_iteration(entry: Path) -> bool:
    return bool(_ITERATION_FOLDER.fullmatch(entry.name))


def _rank_folders(folder: Path) -> dict[tuple[int, int], Path]:
    places: dict[tuple[int, int], Path] = {}
    for entry in sorted(folder.glob("mp_rank_*")):
        match = _RANK_FOLDER.fullmatch(entry.name)
        if not match:
            raise ValueError(
                f"{entry} is of an expert-parallel or unknown layout; only mp_rank_TT and mp_rank_TT_PPP are read"
            )
        rank = (int(match[1]), int(match[2] or 0))
        if rank in places:
            raise ValueError(f"{folder} holds rank {rank} twice: {places[rank].name} and {entry.name}; remove one")
        places[rank] = entry
    tp_size, pp_size = (max(rank[axis] for rank in places) + 1 for axis in (0, 1))
    missing = [(tp, pp) for tp in range(tp_size) for pp in range(pp_size) if (tp, pp) not in places]
    if missing:
        raise ValueError(
            f"{folder} lacks the folder of (tp rank, pp rank) {', '.join(map(str, missing))} of tp {tp_size} x pp "
            f"{pp_size}; copy it from the machine that wrote it"
        )
    return places


def _read_rank(rank: tuple[int, int], folder: Path) -> RankCheckpoint:
    path = folder / MODEL_FILE
    if not path.is_file():
        raise ValueError(f"{folder} has no {MODEL_FILE}; copy it from the machine that wrote it")
    file = read_torch_file(path)
    if not isinstance(file.tree, Mapping):
        raise ValueError(f"{path} does not hold a dict; it is no rank of a Megatron checkpoint")
    names = sorted(
        (name for name in file.tree if isinstance(name, str) and _CHUNK.fullmatch(name)),
        key=lambda name: int(name[5:] or 0),
    )
    chunks = tuple(file.tree[name] for name in names)
    wanted = ["model"] if len(names) == 1 and names[0] == "model" else [f"model{n}" for n in range(len(names))]
    if not names or names != wanted or not all(isinstance(chunk, Mapping) for chunk in chunks):
        raise ValueError(
            f"{path} holds the model as {names or 'nothing'}; 'model' or 'model0', 'model1', ... are expected"
        )
    optimizer_path = folder / OPTIMIZER_FILE
    optimizer_file = read_torch_file(optimizer_path) if optimizer_path.is_file() else None
    return RankCheckpoint(rank[0], rank[1], file, optimizer_file, chunks)


def _iteration(folder: Path, ranks: Mapping[tuple[int, int], RankCheckpoint]) -> int:
    found = {rank.file.path: rank.tree.get("iteration", 0) for rank in ranks.values()}
    first_path, first = next(iter(found.items()))
    for path, iteration in found.items():
        if iteration != first:
            raise ValueError(
                f"{path} is of iteration {iteration}, {first_path} of iteration {first}: they are of different "
                "checkpoints"
            )
    named = _ITERATION_FOLDER.fullmatch(folder.name)
    if named and int(named[1]) != first:
        raise ValueError(
            f"{first_path} is of iteration {first}, but lies in {folder.name}; it is of another checkpoint"
        )
    return int(first)


def _check_together(tree: LegacyTree) -> None:
    first = tree.first
    sizes = {"tensor_model_parallel_size": tree.tp_size, "pipeline_model_parallel_size": tree.pp_size}
    for rank in tree.ranks.values():
        path = rank.file.path
        for name, size in sizes.items():
            if rank.args.get(name, size) != size:
                raise ValueError(
                    f"{path} was written with {name} {rank.args[name]}, but {tree.folder} holds ranks of {size}; "
                    "copy all "
                    "mp_rank_* folders of one checkpoint"
                )
        if len(rank.chunks) != len(first.chunks):
            raise ValueError(
                f"{path} holds {len(rank.chunks)} model chunks, {first.file.path} {len(first.chunks)}: they are of "
                "different checkpoints"
            )
        for name in _SAME_ON_ALL_RANKS:
            if rank.args.get(name) != first.args.get(name):
                raise ValueError(
                    f"{path} was written with {name} {rank.args.get(name)}, {first.file.path} with "
                    f"{first.args.get(name)}: they are of different checkpoints"
                )
        if (rank.optimizer_file is None) != (first.optimizer_file is None):
            lacking = rank if rank.optimizer_file is None else first
            raise ValueError(
                f"{lacking.file.path.parent} lacks {OPTIMIZER_FILE}, which other ranks have; copy it from the "
                "machine that "
                "wrote it, or move it away from all ranks to convert the weights alone"
            )
