"""What each of four ranks writes and reads of a checkpoint, counted in bytes, and what travels between them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_rb.platform import get_platform
from megatron_rb.platform.mcore_shims import install_mcore_shims

install_mcore_shims(get_platform("cpu"))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.distributed import DistributedDataParallel  # noqa: E402
from torch.distributed.checkpoint import FileSystemReader  # noqa: E402

from megatron_rb.checkpoint.manager import load_weights  # noqa: E402
from megatron_rb.checkpoint.sharded import TrainingState, load_sharded, model_state, save_sharded  # noqa: E402
from megatron_rb.checkpoint.storage.tensors import FilePool  # noqa: E402
from megatron_rb.parallel.sharding import ShardSpec  # noqa: E402
from tests.distributed.cases_sharding import full_values, start, step  # noqa: E402

SPECS = {
    "whole": ShardSpec((41, 24)),
    "rows": ShardSpec((256, 48), dim=0),
    "columns": ShardSpec((48, 251), dim=1),
    "norm": ShardSpec((48,)),
    "fused": ShardSpec((2 * 251, 40), dim=0, stride=2),
}
"""Of which `whole` and `norm` lie on every tensor-parallel rank."""
COLLECTIVES = (
    "all_gather all_gather_into_tensor all_reduce batch_isend_irecv broadcast gather irecv isend "
    "recv reduce reduce_scatter reduce_scatter_tensor scatter send"
).split()


@contextmanager
def counted_reads() -> Iterator[list[int]]:
    """Bytes of each read of tensors."""
    read_into, lengths = FilePool.read_into, []

    def read(pool: FilePool, path: Path, position: int, out: memoryview) -> None:
        lengths.append(len(out))
        read_into(pool, path, position, out)

    with mock.patch.object(FilePool, "read_into", read):
        yield lengths


@contextmanager
def counted_gathers() -> Iterator[list[int]]:
    """Ranks of each gathering of objects onto all of them."""
    gather, sizes = dist.all_gather_object, []

    def counting(objects: list[Any], *args: Any, **options: Any) -> None:
        sizes.append(len(objects))
        gather(objects, *args, **options)

    with mock.patch.object(dist, "all_gather_object", counting):
        yield sizes


@contextmanager
def counted_messages() -> Iterator[list[int]]:
    """Bytes of floating-point numbers that this rank gives to each collective or message."""
    sizes: list[int] = []

    def count(original: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **options: Any) -> Any:
            given = [value for value in (*args, *options.values()) if isinstance(value, torch.Tensor)]
            sizes.extend(value.numel() * value.itemsize for value in given if value.is_floating_point())
            return original(*args, **options)

        return counting

    with mock.patch.multiple(dist, **{name: count(getattr(dist, name)) for name in COLLECTIVES}):
        yield sizes


def written(folder: Path) -> list[int]:
    """Bytes of tensors in the files of each rank, as the table of contents says; objects are not counted."""
    metadata, bytes_of_rank = FileSystemReader(folder).read_metadata(), [0] * dist.get_world_size()
    for index, info in metadata.storage_data.items():
        entry = metadata.state_dict_metadata[index.fqn]
        sizes = [chunk.sizes for chunk in getattr(entry, "chunks", []) if chunk.offsets == index.offset]
        rank = int(re.match(r"__(\d+)_", info.relative_path)[1])
        bytes_of_rank[rank] += sum(size.numel() * entry.properties.dtype.itemsize for size in sizes)
    return bytes_of_rank


def live_tensors(state: TrainingState) -> list[torch.Tensor]:
    """Weights, fp32 copies and moments of this rank."""
    inner = state.optimizer.chained_optimizers[0].optimizer
    main = [parameter for group in inner.param_groups for parameter in group["params"]]
    moments = [inner.state[parameter][name] for parameter in main for name in ("exp_avg", "exp_avg_sq")]
    return [parameter.data for parameter in state.chunks[0].parameters()] + [value.data for value in main + moments]


def spoil(state: TrainingState) -> None:
    for value in live_tensors(state):
        value.fill_(-3.0)


def trained(tp_size: int, distributed: bool, dtype: str) -> tuple[DistributedDataParallel, TrainingState]:
    chunk, state = start(tp_size, distributed, SPECS, dtype)
    step(chunk, state)
    step(chunk, state)
    return chunk, state


def round_trip(folder: Path, tp_size: int, distributed: bool, dtype: str) -> dict[str, Any]:
    """Save and load under one layout, with everything counted."""
    chunk, state = trained(tp_size, distributed, dtype)
    with counted_messages() as saving, counted_gathers() as gathers:
        save_sharded(state, folder, asynchronous=False)
    saved = [value.clone() for value in live_tensors(state)]
    spoil(state)
    with counted_reads() as reads, counted_messages() as loading:
        load_sharded(state, folder, with_rng=False)
    equal = all(map(torch.equal, saved, live_tensors(state)))
    spoil(state)
    with counted_reads() as weight_reads:
        load_weights([chunk], {}, folder_with_manifest(folder))
    return {
        "written": written(folder),
        "sent_while_saving": sum(saving),
        "gathers_while_saving": len(gathers),
        "read": sum(reads),
        "sent_while_loading": sum(loading),
        "weights_read": sum(weight_reads),
        "weights_of_rank": sum(value.numel() * value.itemsize for value in chunk.parameters()),
        "equal": equal,
        "weights_equal": all(map(torch.equal, saved, list(chunk.parameters()))),
    }


def folder_with_manifest(folder: Path) -> Path:
    """The folder, once it says what it is."""
    if dist.get_rank() == 0:
        (folder / "checkpoint.json").write_text('{"format": 1, "step": 1, "model": {}, "layout": {}}')
    dist.barrier()
    return folder


def other_layouts(folder: Path) -> dict[str, float]:
    """How far weights are off after a change of degrees and one more step, by change; the largest of all values."""
    distances = {}
    for before, after in ((1, 4), (4, 1), (2, 1), (1, 2)):
        target = folder / f"{before}-{after}"
        target.mkdir(exist_ok=True)
        chunk, state = trained(before, True, "fp32")
        save_sharded(state, target, asynchronous=False)
        step(chunk, state)
        straight = full_values(chunk)
        chunk, state = start(after, True, SPECS)
        spoil(state)
        load_sharded(state, target, with_rng=False)
        step(chunk, state)
        again = full_values(chunk)
        distances[target.name] = max((straight[name] - again[name]).abs().max().item() for name in SPECS)
    return distances


def gathered_by_megatron(state: TrainingState, is_loading: bool) -> dict[str, Any]:
    """A state in megatron-core's own form, the optimizer gathered on one data-parallel rank: as earlier versions."""
    model = model_state(state.chunks)
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "chained_optim_avoid_prefix": True,
    }
    for each in getattr(state.optimizer, "chained_optimizers", [state.optimizer]):
        each.data_parallel_group_gloo = each.data_parallel_group  # on a CPU the group has gloo already
    optimizer = state.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
    return {"model": model, "optimizer": optimizer}


def earlier_versions(folder: Path) -> dict[str, Any]:
    """Whether values are the same when they were saved by an earlier version, and when one loads them."""
    results: dict[str, Any] = {}
    for name, before, after in (("same", 2, 2), ("other", 2, 1)):
        old, new = folder / f"old-{name}", folder / f"new-{name}"
        old.mkdir(exist_ok=True)
        new.mkdir(exist_ok=True)
        _, state = trained(before, True, "bf16")
        dist_checkpointing.save(gathered_by_megatron(state, False) | {"parts": {}}, str(old))
        save_sharded(state, new, asynchronous=False)
        _, state = start(after, True, SPECS, "bf16")
        loaded = dist_checkpointing.load(gathered_by_megatron(state, True), str(new))
        state.optimizer.load_state_dict(loaded["optimizer"])
        for chunk in state.chunks:
            for key, sharded in chunk.module.sharded_state_dict().items():
                sharded.data.data.copy_(loaded["model"][key])
        by_megatron = [value.clone() for value in live_tensors(state)]
        trained_there = was_trained(state)
        spoil(state)
        with counted_reads() as reads:
            load_sharded(state, old, with_rng=False)
        equal = all(map(torch.equal, by_megatron, live_tensors(state)))
        results[name] = {"trained": trained_there, "equal": equal, "read": sum(reads), "stored": sum(written(old))}
    return results


def was_trained(state: TrainingState) -> bool:
    """Two steps have been counted, and no value was left that was there before."""
    inner = state.optimizer.chained_optimizers[0].optimizer
    moments = [inner.state[parameter]["exp_avg"] for group in inner.param_groups for parameter in group["params"]]
    return {group["step"] for group in inner.param_groups} == {2} and any(bool(moment.any()) for moment in moments)


def failing_rank(folder: Path) -> dict[str, str]:
    """What each rank says when the file system of rank 2 fails, by what is loaded."""
    chunk, state = trained(1, True, "fp32")
    save_sharded(state, folder, asynchronous=False)
    manifest_folder = folder_with_manifest(folder)
    read_into = FilePool.read_into

    def read(pool: FilePool, path: Path, position: int, out: memoryview) -> None:
        if dist.get_rank() == 2:
            raise OSError(f"[Errno 5] Input/output error: '{path.name}'")
        read_into(pool, path, position, out)

    words = {}
    with mock.patch.object(FilePool, "read_into", read):
        words["everything"] = _error(lambda: load_sharded(state, folder, with_rng=False))
        words["weights"] = _error(lambda: load_weights([chunk], {}, manifest_folder))
    if dist.get_rank() == 2:
        blind = mock.patch.object(FileSystemReader, "read_metadata", side_effect=FileNotFoundError("no .metadata here"))
    else:
        blind = mock.patch.object(FileSystemReader, "unused", create=True)
    with blind:
        words["contents"] = _error(lambda: load_sharded(state, folder, with_rng=False))
    return words


class Numbered:
    """A state that is the rank's number, which it must not be."""

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": 3, "rank": dist.get_rank()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def other_states(folder: Path) -> list[str]:
    """What a rank whose small state is another than rank 0's says while saving."""
    _, state = trained(1, True, "fp32")
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megatron_rb.checkpoint.sharded")
    logger.addHandler(handler)
    save_sharded(replace(state, parts={"loader": Numbered()}), folder, asynchronous=False)
    logger.removeHandler(handler)
    return said


def other_shape(folder: Path) -> str:
    """What each rank says of a tensor of another shape in the checkpoint."""
    _, state = trained(1, True, "fp32")
    save_sharded(state, folder, asynchronous=False)
    _, state = start(1, True, SPECS | {"rows": ShardSpec((255, 48), dim=0)})
    return _error(lambda: load_sharded(state, folder, with_rng=False))


def everything(folder: str) -> dict[str, Any]:
    """All cases in one world."""

    def sub(name: str) -> Path:
        path = Path(folder) / name
        path.mkdir(exist_ok=True)
        return path

    results: dict[str, Any] = {}
    for tp_size in (1, 2):
        for dtype in ("fp32", "bf16"):
            for distributed in (True, False):
                name = f"tp{tp_size}-{dtype}-{'distributed' if distributed else 'replicated'}"
                results[name] = round_trip(sub(name), tp_size, distributed, dtype)
    results["other_layouts"] = other_layouts(sub("other"))
    results["earlier"] = earlier_versions(sub("earlier"))
    results["failing"] = failing_rank(sub("failing"))
    results["states"] = other_states(sub("states"))
    results["shape"] = other_shape(sub("shape"))
    return results


def _error(action: Callable[[], Any]) -> str:
    try:
        action()
    except (ValueError, OSError) as error:
        return str(error)
    return "no error"
