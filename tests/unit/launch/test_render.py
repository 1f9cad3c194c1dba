"""Scripts as text: exact, editable by a site, and faithful to every value."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rb.config.schema import SlurmConfig
from megatron_rb.launch.job import Host, JobSpec, SshSpec, load_job
from megatron_rb.launch.render import environment_script, host_script, node_script, rank_script, sbatch_script

ODD = "a 'b'  \"c\" $HOME\n`two` \\ lines é"
JOB = JobSpec(
    "megatron_rb.app.worker",
    ("megatron_rb.app.main:train_folder", "/runs/a run"),
    8,
    Path("/runs/a run"),
    name="my run",
    run_id="my_run-1",
    engine="slurm",
    launcher="srun",
    nodes=2,
    spare_nodes=1,
    work_dir=Path("/work dir"),
)


def lines(slurm: SlurmConfig, job: JobSpec = JOB, **more) -> list[str]:
    return sbatch_script(job, slurm, 8, **more).splitlines()


def test_script_asks_for_nodes_spares_and_devices():
    text = lines(SlurmConfig(partition="gpu", account="lab", options=["--exclusive"]))
    for option in (
        "--nodes=3",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--partition=gpu",
        "--account=lab",
        "--exclusive",
        "--requeue",
        "--no-kill",
        "--signal=B:USR1@120",
        '--job-name="my run"',
        '--output="/runs/a run/logs/batch.log"',
    ):
        assert f"#SBATCH {option}" in text


def test_script_is_valid_bash():
    for text in (sbatch_script(JOB, SlurmConfig(), 8), rank_script(JOB), environment_script(JOB)):
        assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


@pytest.mark.parametrize("launcher", ["torchrun", "ft_launcher"])
def test_another_launcher_is_started_once_per_node(launcher: str):
    job = replace(JOB, launcher=launcher)
    text = node_script(job)
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    assert "--nnodes=2 --nproc-per-node=8 --node-rank=$NODE_RANK --max-restarts=0" in text
    assert 'bash "$run_dir/launch/node.sh"' in sbatch_script(job, SlurmConfig(), 8)
    assert 'bash "$run_dir/launch/rank.sh"' in sbatch_script(JOB, SlurmConfig(), 8)


def test_site_template_extends_ours(tmp_path):
    site = tmp_path / "site.j2"
    site.write_text('{% extends "sbatch.j2" %}{% block start %}srun hostname\n{% endblock %}')
    text = sbatch_script(JOB, SlurmConfig(template=str(site)), 0)
    assert text.endswith("srun hostname\n") and "#SBATCH --nodes=3" in text


def test_unknown_name_in_a_template_is_named(tmp_path):
    (tmp_path / "site.j2").write_text("{{ job.nodess }}")
    with pytest.raises(ValueError, match="nodess"):
        sbatch_script(JOB, SlurmConfig(template=str(tmp_path / "site.j2")), 0)


@pytest.mark.parametrize(
    ("runtime", "words"),
    [("pyxis", "'--container-image=img.sqsh'"), ("apptainer", "apptainer exec --nv --bind")],
)
def test_containers_of_both_runtimes(runtime: str, words: str):
    text = sbatch_script(JOB, SlurmConfig(container_image="img.sqsh", container_runtime=runtime), 8)
    assert words.strip("'") in text
    assert "/runs/a run:/runs/a run" in text


def test_sweep_is_an_array():
    text = lines(SlurmConfig(array_limit=2), runs=5)
    assert "#SBATCH --array=0-4%2" in text
    assert "run_dir='/runs/a run'/$SLURM_ARRAY_TASK_ID" in text


def test_dependency_is_an_option():
    text = lines(SlurmConfig(), replace(JOB, after="77"))
    assert "#SBATCH --dependency=afterok:77" in text and "#SBATCH --kill-on-invalid-dep=yes" in text


def test_environment_value_survives_the_script():
    script = environment_script(replace(JOB, env={"ODD": ODD}))
    done = subprocess.run(["bash", "-c", script + '\nprintf %s "$ODD"'], capture_output=True, text=True, check=True)
    assert done.stdout == ODD


def test_machine_of_another_type_gets_its_own_environment():
    job = replace(JOB, engine="ssh", launcher="torchrun", env={"KIND": "none"}, node_env={"b": {"KIND": "musa"}})
    assert "export KIND=none" in host_script(job, "a") and "export KIND=musa" in host_script(job, "b")
    assert "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in host_script(job, "a")


def test_saved_job_comes_back_the_same(tmp_path):
    ssh = SshSpec((Host("a", 8, "MTT"),), ("-F", "x"))
    job = replace(JOB, run_dir=tmp_path, ssh=ssh, env={"ODD": ODD}, secrets=("TOKEN",))
    job.save()
    assert load_job(tmp_path) == job


def test_every_script_raises_the_limit_of_open_files_to_the_hard_one():
    texts = [sbatch_script(JOB, SlurmConfig(), 8), rank_script(JOB), node_script(replace(JOB, launcher="torchrun"))]
    assert all("\nulimit -S -n hard\n" in text for text in [*texts, host_script(replace(JOB, launcher="direct"), "a")])


PRINTS_VARIABLES = """
import json, os, shutil, sys
with open("found", "w") as file:
    json.dump({name: os.environ[name] for name in sys.argv[1:]}, file)
shutil.rmtree(os.environ["RB_BEATS"])  # nobody reads them
"""
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH")


def cache_folders_of_rank(tmp_path: Path, **env: str) -> dict[str, str]:
    """Where the process of a rank compiles into, when its script runs on a machine called `a`."""
    (tmp_path / "worker.py").write_text(PRINTS_VARIABLES)
    job = replace(JOB, module="worker", arguments=CACHES, run_dir=tmp_path, work_dir=tmp_path, launcher="torchrun")
    script = rank_script(replace(job, python=sys.executable))
    given = {"PATH": os.environ["PATH"], "RB_NODE": "a", "RANK": "0", "RB_NUMBER": "1", "TMPDIR": str(tmp_path)} | env
    subprocess.run(["bash", "-c", script], env=given, check=True, timeout=60)
    return json.loads((tmp_path / "found").read_text())


def test_kernels_are_compiled_into_a_private_folder_of_the_machine(tmp_path):
    private = tmp_path / f"rb-kernels-{os.getuid()}-a"
    assert cache_folders_of_rank(tmp_path) == {
        "TRITON_CACHE_DIR": f"{private}/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"{private}/inductor",
        "CUDA_CACHE_PATH": f"{private}/cuda",
    }
    assert private.stat().st_mode & 0o777 == 0o700


def test_a_cache_folder_of_the_user_stays(tmp_path):
    assert cache_folders_of_rank(tmp_path, TRITON_CACHE_DIR="/mine")["TRITON_CACHE_DIR"] == "/mine"


def test_a_link_that_lies_in_the_place_of_the_cache_folder_is_not_followed(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"rb-kernels-{os.getuid()}-a").symlink_to(tmp_path / "theirs")
    found = Path(cache_folders_of_rank(tmp_path)["TRITON_CACHE_DIR"]).parent
    assert found.parent == tmp_path and found.name.startswith("tmp.")


def test_a_temporary_folder_that_the_machine_lacks_gives_way_to_that_of_the_system(tmp_path):
    node = tmp_path.name
    found = cache_folders_of_rank(tmp_path, TMPDIR=str(tmp_path / "gone"), RB_NODE=node)
    Path("/tmp", f"rb-kernels-{os.getuid()}-{node}").rmdir()
    assert found["CUDA_CACHE_PATH"] == f"/tmp/rb-kernels-{os.getuid()}-{node}/cuda"
