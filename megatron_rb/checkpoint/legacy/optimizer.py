"""The optimizer state of a legacy checkpoint by native name: fp32 weights, both Adam moments, step and groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_rb.checkpoint.hf.table import EMBEDDING
from megatron_rb.checkpoint.legacy.names import Cut
from megatron_rb.checkpoint.legacy.rank_optimizer import MOMENTS, Mapped, Unmappable, map_distributed, map_plain
from megatron_rb.checkpoint.legacy.reading import Reading
from megatron_rb.checkpoint.legacy.tree import OPTIMIZER_FILE, RankCheckpoint
from megatron_rb.checkpoint.legacy.weights import differs, join_parts
from megatron_rb.checkpoint.storage.tensors import FilePool, StoredTensor


@dataclass(frozen=True)
class LegacyOptimizer:
    """Adam's state of every trained parameter, global and unpadded, fp32."""

    param: dict[str, StoredTensor]
    """The fp32 weights that the optimizer steps, by native name; frozen parameters are absent."""
    exp_avg: dict[str, StoredTensor]
    exp_avg_sq: dict[str, StoredTensor]
    step: int
    groups: tuple[dict[str, Any], ...]
    """Scalars of the different parameter groups: lr, betas, eps, weight_decay, wd_mult, lr_mult ..."""


def read_optimizer(reading: Reading) -> LegacyOptimizer | None:
    """The optimizer state, or None when there is none or it cannot be mapped with certainty (said in `dropped`).

    Raises:
        ValueError: some ranks have an optimizer state and others do not.
    """
    tree = reading.tree
    states: dict[tuple[int, int], Any] = {rank: file.tree.get("optimizer") for rank, file in tree.ranks.items()}
    if not any(states.values()):
        return None
    lacking = [tree.ranks[rank].file.path for rank, state in states.items() if not state]
    if lacking:
        raise ValueError(
            f"{lacking[0]} holds no optimizer state, which other ranks have: it is of another checkpoint; replace it"
        )
    try:
        inner = {rank: _inner(state) for rank, state in states.items()}
        step = _common_step(inner, reading.pool)
        groups = _groups(inner, reading.pool)
        mapped = {rank: _map_rank(reading, tree.ranks[rank], state) for rank, state in states.items()}
        joined = {name: _join(reading, mapped, name) for name in MOMENTS}
    except Unmappable as reason:
        reading.dropped.append(("optimizer", f"it cannot be mapped with certainty: {reason}"))
        reading.warnings.append(f"the optimizer state is left out, a new one starts from the weights: {reason}")
        return None
    if any("grad_scaler" in state for state in states.values()):
        reading.dropped.append(("optimizer: grad_scaler", "loss scaling of fp16; a new one starts with its default"))
    frozen = sorted(reading.table.keys() - joined["param"].keys())
    if frozen:
        reading.warnings.append(f"{len(frozen)} parameters have no optimizer state, they were frozen ({frozen[0]} ...)")
    return LegacyOptimizer(joined["param"], joined["exp_avg"], joined["exp_avg_sq"], step, groups)


def _inner(state: Any) -> Mapping[str, Any]:
    """The state dict of torch's or a fused Adam inside megatron-core's."""
    if not isinstance(state, Mapping):
        raise Unmappable("it is of several chained optimizers (experts, or overlapped gathering)")
    inner = state.get("optimizer", state)
    if not isinstance(inner, Mapping) or not isinstance(inner.get("param_groups"), list):
        raise Unmappable(f"its entries {sorted(map(str, state))} are of no optimizer of megatron-core")
    return inner


def _map_rank(reading: Reading, rank: RankCheckpoint, state: Mapping[str, Any]) -> Mapped:
    if "state" in _inner(state):
        return map_plain(reading, rank, state)
    if rank.optimizer_file is None:
        raise Unmappable(f"its tensors should be in {OPTIMIZER_FILE} of every rank, which is not there")
    return map_distributed(reading, rank, rank.optimizer_file.tree)


def _common_step(inner: Mapping[Any, Mapping[str, Any]], pool: FilePool) -> int:
    steps = set()
    for state in inner.values():
        entries = [*state["param_groups"], *(entry for entry in (state.get("state") or {}).values())]
        steps |= {_number(entry["step"], pool) for entry in entries if isinstance(entry, Mapping) and "step" in entry}
    steps.discard(None)
    if len(steps) != 1:
        raise Unmappable(f"it counts {sorted(steps)[:5] or 'no'} steps; one number for all parameters is expected")
    (step,) = steps
    if step != int(step):
        raise Unmappable(f"it counts {step} steps")
    return int(step)


def _number(value: Any, pool: FilePool) -> Any:
    return pool.read(value).item() if isinstance(value, StoredTensor) and value.num_rows == 1 else value


def _groups(inner: Mapping[Any, Mapping[str, Any]], pool: FilePool) -> tuple[dict[str, Any], ...]:
    """The different groups of all ranks, in their order."""
    groups: list[dict[str, Any]] = []
    for state in inner.values():
        for group in state["param_groups"]:
            scalars = {key: _number(value, pool) for key, value in group.items() if key not in ("params", "step")}
            if scalars not in groups:
                groups.append(scalars)
    return tuple(groups)


def _join(reading: Reading, mapped: Mapping[tuple[int, int], Mapped], moment: str) -> dict[str, StoredTensor]:
    """One kind of tensor of all parameters."""
    whole: dict[str, StoredTensor] = {}
    for site in reading.sites:
        held = [mapped[tp_rank, site.pp_rank].get(site.native) for tp_rank in range(reading.tree.tp_size)]
        parts = [moments[moment] for moments in held if moments is not None]
        if not parts:
            continue
        if len(parts) < len(held):
            raise Unmappable(f"{site.native} was trained on {len(parts)} of {len(held)} tensor-parallel ranks only")
        tensor = join_parts(reading, site, parts)
        if site.parameter.cut is Cut.WHOLE and any(differs(reading.pool, parts[0], part) for part in parts[1:]):
            reading.warnings.append(
                f"{moment} of {site.native} differs between tensor-parallel ranks; that of rank 0 is taken"
            )
        if not reading.is_tied_copy(site):
            whole[site.native] = tensor
        elif EMBEDDING in whole and differs(reading.pool, whole[EMBEDDING], tensor):
            reading.warnings.append(
                f"{moment} of the tied embedding differs between the stages; that of the first is taken"
            )
    return whole
