"""A training checkpoint for a cluster of another kind: the same numbers, nothing that belongs to a device.

Tensors are device neutral already. What is not: the runtime switches that an optimizer implementation keeps in its
parameter groups, random states, and objects of a layer implementation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_rb.checkpoint.conversion.import_hf import key_map, write_checkpoint
from megatron_rb.checkpoint.conversion.integrity import check_containers
from megatron_rb.checkpoint.conversion.outcome import Outcome, Summary, check_written, files_identity, known_checksums
from megatron_rb.checkpoint.conversion.stream import Job, Progress, Silent, Target, TensorRows, paths_of
from megatron_rb.checkpoint.conversion.workspace import Workspace
from megatron_rb.checkpoint.hf.side_files import copy_side_files
from megatron_rb.checkpoint.manifest import RESEED, SIDE_FOLDER, find_checkpoint, find_side_files, read_manifest
from megatron_rb.checkpoint.storage.restricted import Opaque
from megatron_rb.checkpoint.storage.tensors import FilePool, StoredTensor, as_bytes, open_files, row_blocks
from megatron_rb.checkpoint.storage.torch_dist import COMMON, Blob, DistFolder, read_dist_folder
from megatron_rb.platform import available_platforms

PROVENANCE = "provenance"
"""Folder in which a migrated checkpoint keeps the random states of the device it came from."""
RNG_PREFIX = "rng/"
RESTORED_RNG = "__rng.distcp"
MAIN_PARAMS = "optimizer.state.param."
CHECKING = "checking"

RUNTIME_KEYS = {
    "amsgrad",
    "maximize",
    "foreach",
    "fused",
    "capturable",
    "differentiable",
    "decoupled_weight_decay",
    "bias_correction",
    "master_weights",
    "use_decoupled_grad",
    "store_param_remainders",
    "set_grad_none",
}
"""Switches of one optimizer implementation; the one of the target has its own."""
FUSED_ADAM = {"bias_correction": True}
"""What Transformer Engine's and Apex's FusedAdam read from a parameter group; they are found on CUDA only."""


def migrate_checkpoint(checkpoint: str | Path, out: str | Path, to: str, progress: Progress | None = None) -> Summary:
    """Rewrite a training checkpoint for the platform `to`: `cuda`, `musa`, `cpu` or a plug-in.

    Weights, fp32 main weights, both Adam moments, step, schedule and data position are carried over bit for bit.

    Raises:
        ValueError: there is no checkpoint, it holds something this stack did not write, or `out` is taken.
    """
    if to not in available_platforms():
        raise ValueError(f"--to '{to}' is not known; use {', '.join(available_platforms())}")
    source = find_checkpoint(checkpoint)
    manifest, stored = read_manifest(source), read_dist_folder(source)
    common = portable_common(stored.read_common(), to, source)
    rng, dropped = _sort_objects(stored, source)
    targets = [Target(t.name, t.dtype, t.shape, (TensorRows.whole(t),)) for t in stored.tensors.values()]
    identity = {"migrate": str(source.resolve()), "to": to, "files": files_identity(paths_of(targets))}
    origin = manifest["layout"].get("device_type", manifest["platform"].get("platform", "unknown"))
    outcome = Outcome("migrate", {"checkpoint": str(source.resolve()), "platform": origin}, {}, key_map(targets))
    outcome.dropped = dropped
    workspace = Workspace(out, identity)
    with open_files() as pool, workspace.opened(sum(target.num_bytes for target in targets)):
        job = Job(pool, progress or Silent(), known=known_checksums(source))
        folder = workspace.folder
        # Checksums of a manifest are compared on the way.
        check_containers(stored.blobs_of(stored.tensors.keys() - job.known.keys()), job)
        objects, manifest = _random_states(source, stored, rng, manifest, to, folder, outcome)
        manifest["layout"] = manifest["layout"] | {"device_type": to}
        manifest["platform"] = {"platform": to, "migrated_from": manifest["platform"]}
        write_checkpoint(workspace, targets, outcome, manifest, common, job, objects)
        _copy_side_files(source, folder)
        with workspace.discarded_when_wrong():
            written = read_dist_folder(folder).tensors
            check_written(written, outcome, job)
        outcome.extra = {"main_weights": check_main_weights(written, job)}
        outcome.write(folder)
        workspace.publish()
    return outcome.summary(out)


def portable_common(common: Any, to: str, origin: Path) -> dict[str, Any]:
    """The scalars of a checkpoint with the parameter groups as the optimizer of a platform reads them."""
    strange = _strange(common)
    if strange:
        raise ValueError(f"{origin}/{COMMON} holds {strange}, which this stack does not write; it cannot be migrated")
    common = dict(common)
    optimizer = dict(common.get("optimizer") or {})
    kind = optimizer.get("param_state_sharding_type", "fully_reshardable")
    if kind != "fully_reshardable":
        raise ValueError(
            f"{origin} holds an optimizer of the sharding type {kind}, which is tied to its data-parallel size; "
            "save it as fully_reshardable"
        )
    if "optimizer" in optimizer:
        inner = dict(optimizer["optimizer"])
        inner["param_groups"] = [portable_group(group, to) for group in inner["param_groups"]]
        common["optimizer"] = optimizer | {"optimizer": inner}
    return common


def portable_group(group: Mapping[str, Any], to: str) -> dict[str, Any]:
    """A parameter group without the switches of the optimizer that wrote it, and with an integer step."""
    kept = {key: value for key, value in group.items() if key not in RUNTIME_KEYS}
    if "step" in kept:
        kept["step"] = int(kept["step"])
    return kept | (FUSED_ADAM if to == "cuda" else {})


def _strange(value: Any) -> str:
    """Name of the first thing in a tree that is neither a plain value nor a container of plain values."""
    if isinstance(value, Mapping):
        return next((found for item in value.values() if (found := _strange(item))), "")
    if isinstance(value, list | tuple):
        return next((found for item in value if (found := _strange(item))), "")
    if isinstance(value, Opaque):
        return f"an object of {value.type_name}"
    plain = isinstance(value, str | int | float | bool | bytes | None | torch.dtype)
    return "" if plain else f"an object of {type(value).__name__}"


def _sort_objects(stored: DistFolder, origin: Path) -> tuple[dict[str, Blob], dict[str, str]]:
    """Random states, and what is left out with the reason."""
    rng, dropped = {}, {}
    for name, blob in stored.objects.items():
        if name.startswith(RNG_PREFIX):
            rng[name] = blob
        elif "_extra_state" in name:
            dropped[name] = "state of a layer implementation; no layer of this stack needs one, each makes its own"
        else:
            raise ValueError(f"{origin} holds the object {name}, whose meaning is not known; it cannot be migrated")
    return rng, dropped


def _random_states(
    source: Path,
    stored: DistFolder,
    rng: Mapping[str, Blob],
    manifest: dict[str, Any],
    to: str,
    folder: Path,
    outcome: Outcome,
) -> tuple[dict[str, Blob], dict[str, Any]]:
    """Keep the states of the device that is left, or bring back those of the device that is returned to.

    Device generators of two vendors give different numbers from the same state, so a state is restored only on the
    kind of device that saved it; elsewhere the run is seeded from (seed, rank, step).
    """
    kept = _provenance(source)
    origin = manifest["layout"].get("device_type")
    if origin == to:
        blobs = {name: _blob_bytes(stored.folder / blob.file, blob) for name, blob in rng.items()}
        outcome.rng = "carried over: the device is of the same kind"
    elif kept and kept["device_type"] == to and kept["step"] == manifest["step"]:
        blobs = {name: (source / PROVENANCE / file).read_bytes() for name, file in kept["files"].items()}
        outcome.rng = f"the states of {to} were kept on the way and are back"
        manifest = {key: value for key, value in manifest.items() if key != RESEED}
    else:
        if rng:
            _keep(folder, {name: _blob_bytes(stored.folder / b.file, b) for name, b in rng.items()}, manifest)
            outcome.rng = f"seeded anew on {to} from (seed, rank, step); the states of {origin} are in {PROVENANCE}/"
        return {}, manifest | {RESEED: True}
    return _write_objects(folder, blobs), manifest


def _blob_bytes(path: Path, blob: Blob) -> bytes:
    with open(path, "rb") as file:
        file.seek(blob.position)
        return file.read(blob.length)


def _provenance(source: Path) -> dict[str, Any] | None:
    path = source / PROVENANCE / "rng.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _keep(folder: Path, blobs: Mapping[str, bytes], manifest: Mapping[str, Any]) -> None:
    target = folder / PROVENANCE
    target.mkdir(exist_ok=True)
    files = {}
    for number, (name, content) in enumerate(blobs.items()):
        files[name] = f"rng_{number}.pt"
        (target / files[name]).write_bytes(content)
    about = {"device_type": manifest["layout"].get("device_type"), "step": manifest["step"], "files": files}
    (target / "rng.json").write_text(json.dumps(about, indent=1) + "\n")


def _write_objects(folder: Path, blobs: Mapping[str, bytes]) -> dict[str, Blob]:
    if not blobs:
        return {}
    objects, position = {}, 0
    with open(folder / RESTORED_RNG, "wb") as file:
        for name, content in blobs.items():
            file.write(content)
            objects[name] = Blob(RESTORED_RNG, position, len(content))
            position += len(content)
    return objects


def _copy_side_files(source: Path, folder: Path) -> None:
    try:
        side_files = find_side_files(source)
    except ValueError:  # weights and state without config and tokenizer are complete for resuming
        return
    copy_side_files(side_files, folder / SIDE_FOLDER)


def check_main_weights(tensors: Mapping[str, StoredTensor], job: Job) -> dict[str, Any]:
    """Whether the model's weights are the fp32 main weights of the optimizer, rounded."""
    pairs = [
        (tensors[name.removeprefix(MAIN_PARAMS)], main)
        for name, main in tensors.items()
        if name.startswith(MAIN_PARAMS) and name.removeprefix(MAIN_PARAMS) in tensors
    ]
    job.progress.total(CHECKING, sum(main.num_bytes for _, main in pairs))
    differing = [weight.name for weight, main in pairs if not _is_rounded(job, weight, main)]
    return {"compared": len(pairs), "differing": differing}


def _is_rounded(job: Job, weight: StoredTensor, main: StoredTensor) -> bool:
    main = main.with_short_rows()
    while len(weight.shape) > len(main.shape):
        weight = weight.with_fused_rows()
    equal = True
    for start, count in row_blocks(main.num_rows, main.row_bytes):
        wide = _rows(job.pool, main, start, count)
        narrow = _rows(job.pool, weight, start, count)
        equal = equal and bool((wide.to(narrow.dtype).view(torch.uint8) == narrow.view(torch.uint8)).all())
        job.advance(CHECKING, count * main.row_bytes)
    return equal


def _rows(pool: FilePool, tensor: StoredTensor, start: int, count: int) -> torch.Tensor:
    value = torch.empty(count * tensor.row_bytes // tensor.dtype.itemsize, dtype=tensor.dtype)
    pool.read_rows(tensor, start, count, as_bytes(value).data)
    return value
