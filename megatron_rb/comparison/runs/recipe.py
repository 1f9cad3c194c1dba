"""Are two runs of one recipe? Settings that may differ with the machine are left out, the others must be equal."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from megatron_rb.config.schema import Config

OF_THE_MACHINE = (
    "name",
    "run_dir",
    "world_size",
    "cluster",
    "kernels",
    "metrics",
    "planner",
    "platform.name",
    "platform.threads_per_rank",
    "platform.env",
    "model.layers",
    "model.recompute",
    "parallel.overlap_grad_reduce",
    "parallel.overlap_param_gather",
    "parallel.distributed_optimizer",
    "parallel.timeout_minutes",
    "parallel.auto",
    "data.media_root",
    "data.padding",
    "data.padding_buckets",
    "data.verify",
    "data.prefetch_steps",
    "data.decode_threads",
    "schedule.eval_every",
    "schedule.eval_at_start",
    "checkpoint.dir",
    "checkpoint.resume",
    "checkpoint.save_every",
    "checkpoint.keep_last",
    "checkpoint.asynchronous",
)
"""Settings and sections that depend on hardware and place, and do not change what is computed but for rounding."""
PATHS = ("model.hf_path", "data.train", "data.evaluation", "data.tokenizer", "data.chat_template", "checkpoint.init")
"""Compared by their last part: folders lie elsewhere on another cluster."""
LAYOUT = "parallel"
MOST_NAMED = 6


@dataclasses.dataclass(frozen=True)
class SettingDifference:
    """One setting in which two recipes differ."""

    key: str
    a: Any
    b: Any

    def __str__(self) -> str:
        return f"{self.key} ({self.a!r} and {self.b!r})"


def differences(a: Config, b: Config, allowed: Sequence[str] = ()) -> list[SettingDifference]:
    """Settings that make two recipes different.

    Args:
        allowed: keys or sections that may differ as well, e.g. `parallel` for the layout.
    """
    skipped = (*OF_THE_MACHINE, *allowed)
    left, right = _flat(dataclasses.asdict(a)), _flat(dataclasses.asdict(b))
    return [
        SettingDifference(key, left[key], right[key])
        for key in left
        if not _is_below(key, skipped) and _comparable(key, left[key]) != _comparable(key, right[key])
    ]


def explain(found: Sequence[SettingDifference], name_a: str, name_b: str) -> str:
    """The sentence for runs of different recipes: what differs and what to do."""
    named = ", ".join(str(item) for item in found[:MOST_NAMED])
    more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
    keys = [item.key for item in found]
    if all(_is_below(key, (LAYOUT,)) for key in keys):
        keys = [LAYOUT]
    return (
        f"{name_a} and {name_b} are runs of different recipes: {named}{more}; compare runs that share them, or say "
        f"that they may differ with {' '.join(f'--allow {key}' for key in keys[:MOST_NAMED])}"
    )


def check_keys(allowed: Sequence[str]) -> None:
    """Raises ValueError for a key or section that no recipe has."""
    known = _flat(dataclasses.asdict(Config()))
    for key in allowed:
        if not any(_is_below(name, (key,)) for name in known):
            raise ValueError(f"--allow {key}: there is no setting or section of this name")


def _is_below(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _comparable(key: str, value: Any) -> Any:
    if key not in PATHS:
        return value
    names = value if isinstance(value, list) else [value]
    return [PurePosixPath(name).name for name in names]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.") or {f"{prefix}{name}": value}
        else:
            flat[f"{prefix}{name}"] = value
    return flat
