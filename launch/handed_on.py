"""Values that processes get from the environment of `rb launch` and that are written nowhere (`cluster.secrets`)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

EXPORT_OPTION = re.compile(r"^#SBATCH\s+--export[=\s]\s*(\S+)", re.MULTILINE)


def check_secrets(names: Sequence[str], env: Mapping[str, str], place: str = "here") -> None:
    """Raise ValueError for a secret without a value.

    Args:
        place: where it was looked for, in words.
    """
    missing = [name for name in names if name not in env]
    if missing:
        raise ValueError(f"cluster.secrets names {missing[0]}, which is not set {place}; export it, or take it out")


def exported_names(names: Sequence[str], wish: str) -> str:
    """What `sbatch` shall export so that secrets arrive and what the site wants of the rest of an environment stays so.

    Only names are added, never a value. `NONE` and a list both have Slurm load the environment of a login first.

    Args:
        wish: `ALL`, `NONE`, `NIL` or a list, as SBATCH_EXPORT and `--export` have it; empty = ALL.
    """
    words = [word for word in wish.split(",") if word]
    plain = [word.upper() for word in words]
    if not words or "ALL" in plain:
        return wish or "ALL"
    kept = [word for word in words if word.upper() not in ("NONE", "NIL")]
    return ",".join([*kept, *(name for name in names if name not in kept)])


def wished_export(script: str, env: Mapping[str, str]) -> str:
    """The export that `sbatch` would do by itself: the environment wins over the lines of the batch script."""
    found = EXPORT_OPTION.findall(script)
    return env.get("SBATCH_EXPORT") or (found[-1].strip("\"'") if found else "")
