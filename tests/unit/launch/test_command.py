"""The commands of a job: every rank gets its number, values survive the shell, torch is never needed."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rb.config.compose import load_config
from megatron_rb.config.derive import derive
from megatron_rb.launch.command import build_commands, shell_line, threads_per_rank
from megatron_rb.launch.job import JobSpec
from megatron_rb.launch.local import free_port
from megatron_rb.launch.prepare import build_job
from megatron_rb.shapes.shape import load_shape

JOB = JobSpec(module="worker", arguments=("a=1", "name=my run"), processes=3, run_dir=Path("runs/x"), master_port=1234)


def with_env(**env: str) -> JobSpec:
    return JobSpec("worker", (), 1, Path("runs/x"), env=env)


def test_ranks_differ_only_in_their_number():
    commands = build_commands(JOB, "python")
    assert [command.env["RANK"] for command in commands] == ["0", "1", "2"]
    assert {command.argv for command in commands} == {("python", "-m", "worker", "a=1", "name=my run")}
    assert {command.env["WORLD_SIZE"] for command in commands} == {"3"}
    assert commands[2].log == Path("runs/x/logs/rank_2.log")


def test_users_environment_wins_over_the_launchers():
    assert build_commands(with_env(OMP_NUM_THREADS="7"), "python")[0].env["OMP_NUM_THREADS"] == "7"


def test_user_cannot_set_a_rank():
    with pytest.raises(ValueError, match="cluster.env must not set RANK"):
        build_commands(with_env(RANK="3"), "python")


def test_printed_line_runs_in_a_shell():
    script = "import os, sys; print(os.environ['FLAGS'], sys.argv[1])"
    command = build_commands(with_env(FLAGS="-a 'b c' $HOME"), sys.executable)[0]
    line = shell_line(type(command)(0, (sys.executable, "-c", script, "two words"), command.env, command.log))
    done = subprocess.run(["sh", "-c", f"env {line}"], capture_output=True, text=True, check=True)
    assert done.stdout == "-a 'b c' $HOME two words\n"
    assert shlex.split(line)[0].startswith("OMP_NUM_THREADS=")


@pytest.mark.parametrize(("configured", "cores", "processes", "expected"), [(3, 8, 8, 3), (0, 8, 3, 2), (0, 2, 4, 1)])
def test_threads_share_the_cores(configured: int, cores: int, processes: int, expected: int):
    assert threads_per_rank(configured, cores, processes) == expected


def test_free_port_is_one_that_can_be_used():
    assert 1024 <= free_port("127.0.0.1") <= 65535


def test_foreign_address_is_refused():
    with pytest.raises(ValueError, match="192.0.2.1 is not an address of this machine"):
        free_port("192.0.2.1")


def test_more_than_one_machine_is_refused(tmp_path: Path):
    config = load_config(["cluster.num_nodes=2", "world_size=2"])
    with pytest.raises(ValueError, match="cluster.nodes is 2 .* use cluster=ssh or cluster=slurm"):
        build_job(config, derive(config, load_shape(_model(tmp_path))))


def test_job_follows_the_config(tmp_path: Path):
    overrides = ["parallel=tp2", "cluster.env.A=b c", "cluster.master_port=5", "name=n", "cluster.grace_seconds=3"]
    config = load_config(overrides)
    job = build_job(config, derive(config, load_shape(_model(tmp_path))))
    assert (job.processes, job.master_port, job.patience.grace, job.run_dir) == (2, 5, 3.0, Path("runs/n").absolute())
    assert job.env["A"] == "b c"
    assert job.arguments == ("megatron_rb.app.main:train_folder", str(job.run_dir))


def test_the_environment_of_the_vendor_comes_with_the_platform_and_the_cluster_wins(tmp_path: Path):
    config = load_config(["platform=musa", "world_size=1", "cluster.env.MCCL_IB_GID_INDEX=5"])
    job = build_job(config, derive(config, load_shape(_model(tmp_path))))
    assert job.env["MCCL_IB_GID_INDEX"] == "5" and job.env["MCCL_ALGOS"] == "1"
    config = load_config(["platform=cuda", "world_size=1", "platform.env.RANK='1'"])
    with pytest.raises(ValueError, match="platform.env must not set RANK"):
        build_job(config, derive(config, load_shape(_model(tmp_path))))


def test_starting_a_run_imports_no_torch():
    code = (
        "import sys, megatron_rb.cli, megatron_rb.tools.launch; megatron_rb.cli.main(['--help']);"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert "launch" in done.stdout


def _model(folder: Path) -> Path:
    (folder / "config.json").write_text(
        """{"model_type": "qwen2_5_vl", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
        "rope_scaling": {"mrope_section": [2, 3, 3]}, "image_token_id": 1, "video_token_id": 2,
        "vision_start_token_id": 3, "vision_end_token_id": 4,
        "vision_config": {"depth": 2, "hidden_size": 64, "num_heads": 4, "intermediate_size": 96, "patch_size": 14,
        "temporal_patch_size": 2, "spatial_merge_size": 2, "out_hidden_size": 64, "window_size": 112,
        "fullatt_block_indexes": [1]}}"""
    )
    return folder
