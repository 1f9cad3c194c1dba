"""What of an environment goes on into a new job, a new step or a new world of processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rb.config.schema import SlurmConfig
from megatron_rb.launch.command import RankCommand
from megatron_rb.launch.handed_on import check_secrets, exported_names, wished_export
from megatron_rb.launch.job import JobSpec
from megatron_rb.launch.local import start_ranks
from megatron_rb.launch.outer_job import for_submission, unused_wishes, without_filters, without_ranks, without_requests
from megatron_rb.launch.render import sbatch_script
from megatron_rb.launch.supervise import Supervisor

STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_CPU_BIND": "quiet,map_cpu:0",
    "SLURM_MEM_PER_CPU": "100",
    "SLURM_NTASKS": "1",
    "SLURM_CPUS_PER_TASK": "4",
    "SLURM_GPUS_PER_TASK": "1",
    "SLURM_STEP_GPUS": "3",
    "SLURM_EXPORT_ENV": "NONE",
    "SRUN_CPUS_PER_TASK": "4",
    "SLURMD_NODENAME": "n1",
    "CUDA_VISIBLE_DEVICES": "3",
    "ROCR_VISIBLE_DEVICES": "3",
    "PMI_RANK": "0",
    "PMIX_SERVER_URI": "x",
    "OMPI_COMM_WORLD_RANK": "0",
    "RANK": "0",
    "WORLD_SIZE": "8",
    "MASTER_ADDR": "n1",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "RB_FENCE": "/old",
    "SBATCH_MEM_BIND": "local",
}
KEPT = {
    "PATH": "/bin",
    "SLURM_CONF": "/etc/slurm.conf",
    "SLURM_JWT": "x",
    "SBATCH_ACCOUNT": "lab",
    "OMP_NUM_THREADS": "4",
}


def test_a_submission_keeps_the_way_to_the_controller_and_the_users_wishes_only():
    assert for_submission({**STEP, **KEPT}) == KEPT


def test_devices_named_outside_of_a_job_are_the_users_own():
    assert for_submission({"CUDA_VISIBLE_DEVICES": "3"}) == {"CUDA_VISIBLE_DEVICES": "3"}


def test_a_secret_stays_whatever_its_name():
    assert for_submission({"SLURM_TOKEN": "x", "PMI_KEY": "y"}, ["SLURM_TOKEN", "PMI_KEY"]) == {
        "SLURM_TOKEN": "x",
        "PMI_KEY": "y",
    }


def test_a_wish_that_would_take_the_launchers_signal_or_log_is_left_out_and_told():
    wishes = {"SBATCH_SIGNAL": "TERM@60", "SBATCH_OUTPUT": "x", "SBATCH_ARRAY_INX": "0-3", "SBATCH_PARTITION": "gpu"}
    assert for_submission(wishes) == {"SBATCH_PARTITION": "gpu"}
    assert unused_wishes(wishes) == ["SBATCH_ARRAY_INX", "SBATCH_OUTPUT", "SBATCH_SIGNAL"]


def test_a_step_stays_in_its_job_and_asks_for_what_its_own_options_say():
    step = without_requests({**STEP, **KEPT})
    assert set(step) - set(KEPT) == {
        "SLURM_JOB_ID",
        "SLURMD_NODENAME",
        "CUDA_VISIBLE_DEVICES",
        "ROCR_VISIBLE_DEVICES",
        "SBATCH_MEM_BIND",
    }


def test_a_world_on_this_machine_keeps_the_devices_of_the_job_around_it():
    here = without_ranks(STEP)
    assert here["CUDA_VISIBLE_DEVICES"] == "3" and here["SLURM_JOB_ID"] == "7"
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_USE_AGENT_STORE", "PMI_RANK", "RB_FENCE"} & set(here)


def test_views_of_a_person_do_not_narrow_what_a_program_reads():
    assert without_filters({"SQUEUE_STATES": "R", "SCANCEL_INTERACTIVE": "1", "SLURM_CONF": "x"}) == {"SLURM_CONF": "x"}


def test_a_rank_on_this_machine_does_not_take_itself_for_one_of_the_world_around_it(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("GROUP_RANK", "3")
    code = "import os; print([name for name in ('TORCHELASTIC_USE_AGENT_STORE', 'GROUP_RANK') if name in os.environ])"
    ranks = start_ranks([RankCommand(0, (sys.executable, "-c", code), {"RANK": "0"}, tmp_path / "log")])
    assert Supervisor(ranks, [], 20.0).run() == 0
    assert (tmp_path / "log").read_text() == "[]\n"


def left_by_the_script(slurm: SlurmConfig, gpus: int, env: dict[str, str]) -> set[str]:
    """Variables that are there behind the `unset` of the batch script."""
    text = sbatch_script(JobSpec("m", (), 1, Path("/r"), engine="slurm"), slurm, gpus)
    (line,) = [line for line in text.splitlines() if line.startswith("unset ")]
    done = subprocess.run(
        ["bash", "-euc", f"{line}\nenv -0"], env={"PATH": os.environ["PATH"], **env}, capture_output=True, check=True
    )
    return {word.split("=", 1)[0] for word in done.stdout.decode().split("\0")} & set(env)


def test_the_batch_script_drops_what_srun_would_obey():
    left = left_by_the_script(SlurmConfig(), 0, STEP)
    assert left == {"SLURM_JOB_ID", "SLURM_NTASKS", "SLURMD_NODENAME", "SBATCH_MEM_BIND"}


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--mem=900"], "SLURM_MEM_PER_NODE"),
        (["--mem-per-cpu 2G"], "SLURM_MEM_PER_CPU"),
        (["--gpus-per-task=1"], "SLURM_GPUS_PER_TASK"),
        (["-G 8"], "SLURM_GPUS"),
        (["-c4"], "SLURM_CPUS_PER_TASK"),
        (["--exclusive", "--gpu-bind=single:1"], "SLURM_GPU_BIND"),
    ],
)
def test_the_batch_script_keeps_what_the_job_itself_asked_for(options: list[str], name: str):
    env = {name: "own", "SLURM_MEM_PER_GPU": "of another job"}
    assert left_by_the_script(SlurmConfig(options=options), 0, env) == {name}


def test_settings_of_devices_and_cores_are_the_jobs_own_too():
    env = {"SLURM_GPUS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "4", "SLURM_GPUS_PER_TASK": "1"}
    assert left_by_the_script(SlurmConfig(cpus_per_task=4), 8, env) == {"SLURM_GPUS_PER_NODE", "SLURM_CPUS_PER_TASK"}


@pytest.mark.parametrize(
    ("wish", "exported"),
    [
        ("", "ALL"),
        ("ALL", "ALL"),
        ("all,A=1", "all,A=1"),
        ("NONE", "TOKEN,KEY"),
        ("nil", "TOKEN,KEY"),
        ("PATH,A=1", "PATH,A=1,TOKEN,KEY"),
        ("KEY", "KEY,TOKEN"),
    ],
)
def test_secrets_are_exported_beside_what_the_site_wants(wish: str, exported: str):
    assert exported_names(["TOKEN", "KEY"], wish) == exported


@pytest.mark.parametrize("line", ["#SBATCH --export=NONE", "#SBATCH --export NONE", '#SBATCH --export="NONE"'])
def test_the_environments_wish_wins_over_the_scripts(line: str):
    assert wished_export(f"#!/bin/sh\n{line}\n", {}) == "NONE"
    assert wished_export(f"#!/bin/sh\n{line}\n", {"SBATCH_EXPORT": "A"}) == "A"


def test_a_secret_without_a_value_is_named_with_the_place():
    with pytest.raises(ValueError, match="cluster.secrets names B, which is not set in this job; export it"):
        check_secrets(["A", "B"], {"A": ""}, "in this job")
