"""Time limits as Slurm writes them, and those that leave no time for training."""

import subprocess
from math import inf

import pytest

from megatron_rb.config.schema import SlurmConfig
from megatron_rb.launch import slurm
from megatron_rb.launch.time_limit import asked_limit, check_partition, check_warning, limit_seconds


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2", 120),
        ("90", 5400),
        ("1:30", 120),
        ("12:30:00", 45000),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("2-00:00:00", 172800),
        ("0:01", 60),
        ("UNLIMITED", inf),
        ("infinite", inf),
        ("0", inf),
    ],
)
def test_every_format_of_slurm_is_read(text: str, seconds: float):
    assert limit_seconds(text) == seconds


@pytest.mark.parametrize("text", ["30s", "1:2:3:4", "-5", "1-", "1-1:2:3:4", "soon", ""])
def test_what_slurm_does_not_read_is_told_with_its_formats(text: str):
    with pytest.raises(ValueError, match=rf"'{text}' is no time of Slurm; write minutes, .* or UNLIMITED"):
        limit_seconds(text)


@pytest.mark.parametrize("text", ["2", "1", "0:30", "0-0:02"])
def test_a_limit_that_ends_at_the_warning_is_refused_with_both_values(text: str):
    with pytest.raises(ValueError, match=rf"time is {text} \(\d+ s\) and cluster.slurm.warning_seconds 120: .*; use a"):
        check_warning("cluster.slurm.time", text, 120)


@pytest.mark.parametrize("text", ["3", "2:01", "0", "UNLIMITED"])
def test_a_limit_behind_the_warning_is_accepted(text: str):
    check_warning("cluster.slurm.time", text, 120)


@pytest.mark.parametrize(
    ("options", "env", "found"),
    [
        ([], {}, ("cluster.slurm.time", "1")),
        (["--time=5", "-t 2"], {}, ("cluster.slurm.options --time", "2")),
        (["--time 5"], {}, ("cluster.slurm.options --time", "5")),
        (["--time-min=9"], {"SBATCH_TIMELIMIT": "7"}, ("SBATCH_TIMELIMIT", "7")),
    ],
)
def test_the_limit_that_counts_is_found(options: list[str], env: dict[str, str], found: tuple[str, str]):
    assert asked_limit("1", options, env) == found


def test_the_limit_of_the_partition_counts_where_none_is_asked_for():
    slurm = SlurmConfig(options=["--partition=short"])
    with pytest.raises(ValueError, match="time is empty, and the limit of partition short is 1:00"):
        check_partition(slurm, {}, lambda names: {names: "1:00"})


def test_a_partition_is_not_asked_where_a_time_is_given():
    check_partition(SlurmConfig(time="10"), {}, lambda names: pytest.fail("asked"))


@pytest.mark.parametrize(
    ("names", "limits"),
    [("", {"gpu": "1:00:00"}), ("long,short", {"gpu": "1:00:00", "long": "infinite", "short": "2:00"})],
)
def test_a_partitions_own_limit_is_its_usual_one_else_its_longest(monkeypatch, names: str, limits: dict[str, str]):
    said = "gpu*|1:00:00|infinite\nlong|n/a|infinite\nshort|n/a|2:00\n"
    monkeypatch.setattr(slurm, "_try", lambda *words: subprocess.CompletedProcess(words, 0, said, ""))
    assert slurm.partition_limits(names) == limits
