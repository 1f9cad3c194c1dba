"""What all of these tests need: the tiny model, an undisturbed run to compare with, and a cluster."""

import fcntl
import tempfile
from pathlib import Path

import pytest

from megatron_rb.bench.launch.cluster import ClusterOptions, SlurmCluster, unusable_because
from megatron_rb.bench.launch.runs import REPOSITORY, TinyRun
from megatron_rb.builders.build import SampleMix, write_split
from megatron_rb.checkpoint.hf.tiny import TinySize, conversation_texts, write_tiny_model


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    """Model folder and data of the runs."""
    folder = tmp_path_factory.mktemp("inputs")
    mix = SampleMix(tasks=("pointing", "uvd"), views=("side",), windows=0)
    write_split(REPOSITORY / "examples/robosim/heldout", folder, "heldout", mix, 0)
    write_tiny_model(
        conversation_texts(folder / "heldout.jsonl"), folder / "hf", family="qwen3_vl", size=TinySize(), seed=0
    )
    return folder


@pytest.fixture(scope="session")
def undisturbed(inputs, tmp_path_factory) -> dict[int, float]:
    """Loss of every step of a run to which nothing happens."""
    run = TinyRun(inputs, tmp_path_factory.mktemp("undisturbed") / "run")
    done = run.rb(timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    return run.losses()


@pytest.fixture(scope="session")
def one_at_a_time():
    """Two clusters on one machine would share its cores and make every time limit meaningless."""
    with open(Path(tempfile.gettempdir()) / "slurm-tests.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def start_cluster(options: ClusterOptions) -> SlurmCluster:
    reason = unusable_because(options)
    if reason:
        pytest.skip(f"no Slurm cluster here: {reason}")
    return SlurmCluster(options)


@pytest.fixture(scope="session")
def cluster(one_at_a_time):
    """Slurm itself would notice a lost node after minutes only, as on most real clusters."""
    with start_cluster(ClusterOptions(nodes=6, slurmd_timeout=300, sshd=True, small_disk_mb=160)) as cluster:
        yield cluster
