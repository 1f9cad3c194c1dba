"""Slurm's ways to write a time limit, and whether the run has time left when it is warned of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from megatron_rb.config.schema import SlurmConfig

FORMATS = "minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds"
UNLIMITED = ("unlimited", "infinite")
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


def limit_seconds(text: str) -> float:
    """Seconds of a time limit as Slurm counts it: whole minutes, rounded up; 0 and `UNLIMITED` have no end.

    Raises:
        ValueError: Slurm does not read it.
    """
    if text.strip().lower() in UNLIMITED:
        return float("inf")
    found = _CLOCK.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"'{text}' is no time of Slurm; write {FORMATS} or UNLIMITED")
    days, *clock = found.groups()
    units = _units(days is not None, len([part for part in clock if part is not None]))
    seconds = sum(int(part) * unit for part, unit in zip(clock, units, strict=False) if part is not None)
    minutes = -(-(seconds + int(days or 0) * 86400) // 60)
    return minutes * 60.0 if minutes else float("inf")


def asked_limit(time: str, options: Sequence[str], env: Mapping[str, str]) -> tuple[str, str]:
    """(setting, value) of the limit that a job is submitted with; an empty value = that of the partition.

    Args:
        options: further `#SBATCH` options of the job, of which the last wins over `time`.
        env: of the submission, which wins over the batch script.
    """
    if env.get("SBATCH_TIMELIMIT"):
        return "SBATCH_TIMELIMIT", env["SBATCH_TIMELIMIT"]
    found = last_option(options, "time", "t")
    return ("cluster.slurm.options --time", found) if found else ("cluster.slurm.time", time)


def last_option(options: Sequence[str], name: str, letter: str) -> str:
    """Value of the last of several `#SBATCH` options that is `--name=value` or `-l value`; empty without one."""
    form = re.compile(rf"(?:--{name}[=\s]|-{letter}\s*)\s*(\S+)")
    found = [match[1] for option in options if (match := form.fullmatch(option.strip()))]
    return found[-1] if found else ""


def check_warning(setting: str, text: str, warning_seconds: int) -> None:
    """Raise ValueError for a limit that would have the run save and be queued again as soon as it begins."""
    try:
        limit = limit_seconds(text)
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from error
    if limit <= warning_seconds:
        raise ValueError(
            f"{setting} is {text} ({limit:.0f} s) and cluster.slurm.warning_seconds {warning_seconds}: the run would "
            f"save and be queued again as soon as it starts, over and over; use a time longer than that, or a smaller "
            f"warning_seconds"
        )


def check_partition(slurm: SlurmConfig, env: Mapping[str, str], limits: Callable[[str], Mapping[str, str]]) -> None:
    """The same for a job that leaves its limit to the partition.

    Args:
        limits: of the partitions that a comma-separated list names (empty = the cluster's default), in Slurm's words.
    """
    if asked_limit(slurm.time, slurm.options, env)[1]:
        return
    own = last_option(slurm.options, "partition", "p") or slurm.partition
    for name, text in limits(env.get("SBATCH_PARTITION") or own).items():
        check_warning(f"cluster.slurm.time is empty, and the limit of partition {name}", text, slurm.warning_seconds)


def _units(with_days: bool, parts: int) -> tuple[int, ...]:
    """Seconds of each part: alone they are minutes, behind days they begin with hours."""
    if with_days or parts == 3:
        return (3600, 60, 1)
    return (60, 1)
