"""When checkpoints are written, which are kept, and from which a run continues.

A checkpoint is a folder `step_00000010`. It is written under another name and renamed when all ranks have finished, so
a folder with that name is always complete, whatever killed the run that wrote it.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import secrets
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint.api import CheckpointException

from megatron_rb.checkpoint.fence import Fence, Fenced
from megatron_rb.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    RESEED,
    as_json,
    check_same_model,
    complete_steps,
    read_manifest,
)
from megatron_rb.checkpoint.sharded import (
    TrainingState,
    complete_common,
    load_model_only,
    load_sharded,
    save_model_only,
    save_sharded,
)
from megatron_rb.platform.base import Platform

logger = logging.getLogger(__name__)

LEAST_ROOM = 1 << 20
"""Free bytes of a file system that has stopped taking a checkpoint."""
SET_ASIDE = ".not-finite"
"""Ending of a checkpoint whose weights gave no finite loss: kept, but no longer what a run continues from."""
LEFTOVER = re.compile(r"step_\d{8,}\.(writing|deleting)-[0-9a-f]+$")

Value = TypeVar("Value")


@dataclass(frozen=True)
class Restored:
    """What `CheckpointManager.load` found."""

    step: int
    folder: Path
    same_layout: bool
    """True: the random states were restored, the run continues bit for bit. False: it was seeded anew for the step."""


class CheckpointManager:
    """Saves, keeps and restores the checkpoints of one run. All methods are called by every rank together.

    Args:
        folder: where the checkpoints of the run lie; made at the first save.
        keep_last: complete checkpoints that are kept; 0 = all. The newest one that is proven (see `prove`) is kept in
            any case.
        asynchronous: write in a forked process; `maybe_finalize` then completes the checkpoint.
        fence: whether this attempt of the run may still write; None = nobody else can.
    """

    def __init__(
        self,
        folder: str | Path,
        keep_last: int = 2,
        asynchronous: bool = True,
        fence: Fence | None = None,
    ) -> None:
        if keep_last < 0:
            raise ValueError(f"checkpoint.keep_last {keep_last} is negative; 0 keeps all checkpoints")
        self.folder = Path(folder)
        self.keep_last = keep_last
        self.asynchronous = asynchronous
        self.fence = fence
        self._queue = AsyncCallsQueue(persistent=False)
        self._written: set[int] = set()
        self._proven = -1
        self._held_back = False

    def save(self, step: int, state: TrainingState) -> None:
        """Write the checkpoint of `step` (finished optimizer steps); one still being written is completed first.

        A complete checkpoint of the same step is left as it is.
        """
        self.maybe_finalize(blocking=True)
        name = _on_rank_zero(lambda: self._prepare(step))
        if name is None:
            return
        writing = Path(name)
        manifest = {
            "format": FORMAT,
            "step": step,
            "model": dict(state.model),
            "layout": _layout(state),
            "platform": state.platform.info(),
            **state.notes,
        }
        with _children_ignore_stop_signals(), _failures_as_errors(writing):
            request = save_sharded(state, writing, self.asynchronous)
            if request is not None:
                request.add_finalize_fn(lambda: self._complete(writing, manifest))
                self._queue.schedule_async_request(request)
                return
        self._complete(writing, manifest)

    def maybe_finalize(self, blocking: bool = False) -> None:
        """Complete a checkpoint whose background writers have finished; `blocking` waits for them."""
        if self._queue.get_num_unfinalized_calls():
            with _failures_as_errors(self.folder):
                self._queue.maybe_finalize_async_calls(blocking=blocking)

    def close(self) -> None:
        """Complete what is still being written."""
        self.maybe_finalize(blocking=True)

    def prove(self, step: int) -> None:
        """The weights after `step` have given finite numbers: checkpoints up to it may take the place of older ones."""
        self._proven = max(self._proven, step)
        if self._held_back and dist.get_rank() == 0:
            self._delete_older()

    def set_aside_unproven(self) -> None:
        """Rename what this process has saved since the newest proven checkpoint, so that no run continues from it.

        Without a proven checkpoint to go back to, all stays as it is.
        """
        self.maybe_finalize(blocking=True)
        _on_rank_zero(self._set_aside)

    def way_back(self) -> str:
        """What the same command would continue from, in words."""
        return _on_rank_zero(self._way_back)

    def _way_back(self) -> str:
        newest = max(complete_steps(self.folder), default=None)
        if newest is None:
            return "the same command then begins anew"
        if newest <= self._proven:
            return f"the same command then continues from step {newest}"
        return (
            f"the weights of its checkpoint of step {newest} have not given finite numbers here: use another run_dir, "
            f"or move that checkpoint away"
        )

    def _set_aside(self) -> None:
        self._check_fence()
        steps = complete_steps(self.folder)
        if not any(step <= self._proven for step in steps):
            return
        for step in sorted(step for step in steps & self._written if step > self._proven):
            folder = self.folder / f"step_{step:08d}"
            aside = folder.with_name(f"{folder.name}{SET_ASIDE}")
            if aside.exists():  # that of an earlier try is kept too
                aside = aside.with_name(f"{aside.name}-{secrets.token_hex(4)}")
            folder.rename(aside)
            logger.warning("%s gave no finite loss and is now %s", folder, aside.name)

    def take_over(self) -> None:
        """Make this attempt the only writer; call it before `latest`. What others left unfinished is removed."""
        _on_rank_zero(self._remove_unfinished)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None; as rank 0 sees the folder."""
        return _on_rank_zero(lambda: max(complete_steps(self.folder), default=None))

    def load(self, state: TrainingState, step: int | None = None) -> Restored:
        """Restore the newest complete checkpoint, or the one of `step`.

        Raises:
            ValueError: there is none, it is of another model, or it does not fit.
        """
        folder, manifest = _on_rank_zero(lambda: self._select(step))
        check_same_model(manifest, state.model, folder)
        same_layout = manifest["layout"] == as_json(_layout(state)) and not manifest.get(RESEED)
        load_sharded(state, Path(folder), with_rng=same_layout)
        if not same_layout:
            state.reseed(manifest["step"])
            _log_once(f"checkpoint {folder} comes from another layout: random states are seeded anew for its step")
        return Restored(manifest["step"], Path(folder), same_layout)

    def _prepare(self, step: int) -> str | None:
        if step in complete_steps(self.folder):
            logger.info("checkpoint of step %d is complete already", step)
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_unfinished()
        # The random part keeps apart the writers of a killed run, which may still be alive, and those of this one.
        writing = self.folder / f"step_{step:08d}.writing-{secrets.token_hex(4)}"
        writing.mkdir()
        return str(writing)

    def _remove_unfinished(self) -> None:
        self._check_fence()
        for leftover in self.folder.iterdir() if self.folder.is_dir() else ():
            if LEFTOVER.match(leftover.name):
                shutil.rmtree(leftover)

    def _check_fence(self) -> None:
        if self.fence is not None:
            self.fence.check()

    def _complete(self, writing: Path, manifest: dict[str, Any]) -> None:
        def rename_and_retain() -> None:
            self._check_fence()
            complete_common(writing)
            _write_durably(writing / MANIFEST, json.dumps(manifest, indent=2))
            _sync_folder(writing)
            final = writing.with_name(writing.name.partition(".")[0])
            writing.rename(final)
            _sync_folder(self.folder)
            self._written.add(manifest["step"])
            self._delete_older()
            logger.info("checkpoint %s is complete", final)

        _on_rank_zero(rename_and_retain)

    def _delete_older(self) -> None:
        if not self.keep_last:
            return
        steps = sorted(complete_steps(self.folder))
        kept = {max((step for step in steps if step <= self._proven), default=steps[0]), *steps[-self.keep_last :]}
        self._held_back = len(kept) > self.keep_last
        for step in set(steps) - kept:
            folder = self.folder / f"step_{step:08d}"
            deleting = folder.with_name(f"{folder.name}.deleting-{secrets.token_hex(4)}")
            folder.rename(deleting)
            shutil.rmtree(deleting)

    def _select(self, step: int | None) -> tuple[str, dict[str, Any]]:
        steps = complete_steps(self.folder)
        if step is None and not steps:
            raise ValueError(f"there is no complete checkpoint in {self.folder}")
        chosen = max(steps) if step is None else step
        if chosen not in steps:
            found = ", ".join(str(value) for value in sorted(steps)) or "none"
            raise ValueError(f"there is no complete checkpoint of step {chosen} in {self.folder}; found: {found}")
        folder = self.folder / f"step_{chosen:08d}"
        return str(folder), read_manifest(folder)


def save_weights(weights: ShardedStateDict, model: dict[str, Any], platform: Platform, folder: Path) -> None:
    """Write a checkpoint of step 0 that holds weights only, into the existing, empty `folder`."""
    save_model_only(weights, folder)
    manifest = {"format": FORMAT, "step": 0, "model": model, "layout": {}, "platform": platform.info()}

    def complete() -> None:
        complete_common(folder)
        _write_durably(folder / MANIFEST, json.dumps(manifest, indent=2))

    _on_rank_zero(complete)


def load_weights(chunks: list[torch.nn.Module], model: dict[str, Any], folder: str | Path) -> None:
    """Restore only the weights of the checkpoint `folder`; raises ValueError when it does not fit the model."""
    folder = Path(folder)
    manifest = _on_rank_zero(lambda: read_manifest(folder))
    check_same_model(manifest, model, folder)
    load_model_only(chunks, folder)


@contextmanager
def _failures_as_errors(folder: Path) -> Iterator[None]:
    """What the writers of a checkpoint failed of, as an error: torch's own is no `Exception` and hides a full disk.

    Raises:
        OSError: the file system of the folder is full.
        RuntimeError: the writers failed of something else.
    """
    try:
        yield
    except CheckpointException as error:
        if shutil.disk_usage(folder).free < LEAST_ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        raise RuntimeError(f"the checkpoint in {folder} was not written") from error


@contextmanager
def _children_ignore_stop_signals() -> Iterator[None]:
    """Processes started in here never see the signals that stop a run; this one gets them when the block ends.

    A launcher or Slurm signals a whole process group. The writers of a checkpoint belong to it and must live until the
    checkpoint is complete; they inherit the mask of the thread that starts them.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _layout(state: TrainingState) -> dict[str, Any]:
    return dict(state.layout) | {"world_size": dist.get_world_size(), "device_type": state.platform.device_type}


def _on_rank_zero(action: Callable[[], Value]) -> Value:
    """Run on rank 0 and give every rank its result or its error; also a barrier. The result must be picklable."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except (OSError, ValueError, Fenced) as error:
            outcome[1] = error
    # CPU tensors travel over gloo. The broadcast holds the others until rank 0 is done, the reduction rank 0 for them.
    dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
    dist.all_reduce(torch.zeros(1))
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _log_once(message: str) -> None:
    if dist.get_rank() == 0:
        logger.warning(message)


def _write_durably(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
