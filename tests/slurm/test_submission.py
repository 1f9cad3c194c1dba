"""What a new job gets where it is submitted: the secrets of the run, nothing of another job, a folder to work in."""

import pytest

from megatron_rb.bench.launch.cluster import SlurmCluster
from megatron_rb.bench.launch.runs import REPOSITORY
from tests.slurm.submissions import NotedRun

pytestmark = pytest.mark.timeout(100)
TWO_NODES = ["cluster=slurm", "cluster.nodes=2", "cluster.processes_per_node=1", "cluster.slurm.options=['--mem=900']"]
STEP = ("srun", "--ntasks=1", "--mem-per-cpu=100", "--cpu-bind=map_cpu:0", f"--chdir={REPOSITORY}")
IN_STEP = (
    "env",
    f"PYTHONPATH={REPOSITORY}",
    "OMP_NUM_THREADS=1",
    "PMI_RANK=3",
    "TORCHELASTIC_USE_AGENT_STORE=True",
    "CUDA_VISIBLE_DEVICES=5",
    "SLURM_GPUS_PER_TASK=1",
    "LOCAL_RANK=3",
    "ROLE_RANK=3",
)
FOREIGN = {
    "SLURM_CPU_BIND",
    "SLURM_CPU_BIND_LIST",
    "SLURM_MEM_PER_CPU",
    "SLURM_GPUS_PER_TASK",
    "SLURM_EXPORT_ENV",
    "PMI_RANK",
    "TORCHELASTIC_USE_AGENT_STORE",
    "CUDA_VISIBLE_DEVICES",
    "ROLE_RANK",
}


@pytest.fixture(scope="module")
def from_a_step(cluster: SlurmCluster, inputs, tmp_path_factory) -> list[dict[str, str]]:
    """Environments of rank 1 of a run that was started in a step of another job, and of its script submitted there."""
    run = NotedRun(inputs, tmp_path_factory.mktemp("step") / "run", cluster, TWO_NODES)
    cluster.command(*STEP, *IN_STEP, *run.command)
    environments = [run.wait_noted().environment(1)]
    cluster.command(*STEP, *IN_STEP, "sbatch", str(run.run_dir / "launch/job.sbatch"))
    return [*environments, run.wait_noted(attempt=2).environment(1)]


@pytest.mark.parametrize("way", [0, 1], ids=["rb launch", "sbatch"])
def test_a_job_submitted_in_a_step_has_nothing_of_it(from_a_step, way: int):
    assert FOREIGN & set(from_a_step[way]) == set()
    assert (from_a_step[way]["LOCAL_RANK"], from_a_step[way]["SLURM_NTASKS"]) == ("0", "2")


@pytest.mark.parametrize("way", [0, 1], ids=["rb launch", "sbatch"])
def test_memory_of_the_job_itself_reaches_its_steps(from_a_step, way: int):
    assert from_a_step[way]["SLURM_MEM_PER_NODE"] == "900"


@pytest.fixture(scope="module")
def secret(cluster: SlurmCluster, inputs, tmp_path_factory) -> NotedRun:
    """A run whose secret the site would keep back."""
    env = {"TOKEN": "se,cr et\n2", "SBATCH_EXPORT": "NONE", "OTHER": "not asked for"}
    run = NotedRun(inputs, tmp_path_factory.mktemp("secret") / "run", cluster, TWO_NODES, env)
    return run.note("cluster.secrets=[TOKEN]")


def test_a_secret_arrives_where_the_site_exports_nothing(secret: NotedRun):
    environments = [secret.environment(rank) for rank in (0, 1)]
    assert [environment.get("TOKEN") for environment in environments] == ["se,cr et\n2"] * 2
    assert "OTHER" not in environments[0]


def test_the_secret_of_a_job_is_written_nowhere(secret: NotedRun):
    files = [path for path in secret.run_dir.rglob("*") if path.is_file()]
    assert files and not [path for path in files if b"se,cr et" in path.read_bytes()]


def test_a_script_submitted_without_its_secret_fails_with_the_reason(secret: NotedRun):
    assert secret.cluster is not None
    job = secret.cluster.command(
        "env", "-u", "TOKEN", "sbatch", "--parsable", str(secret.run_dir / "launch/job.sbatch")
    )
    secret.wait_state("FAILED", 40)
    assert secret.record.job_id == job.strip()
    assert "cluster.secrets names TOKEN, which is not set in this job" in secret.record.reason


def test_queueing_again_without_the_secret_is_refused(secret: NotedRun):
    done = NotedRun(secret.inputs, secret.run_dir, secret.cluster).act("requeue")
    assert done.returncode == 2 and "cluster.secrets names TOKEN, which is not set here" in done.stderr


@pytest.fixture(scope="module")
def folder_missing(cluster: SlurmCluster, inputs, tmp_path_factory) -> tuple[NotedRun, str]:
    """A run of two nodes, one of which lacks the working folder while the first attempt starts."""
    folder = tmp_path_factory.mktemp("missing")
    (folder / "shared/work").mkdir(parents=True)
    run = NotedRun(inputs, folder / "run", cluster, [*TWO_NODES, "cluster.return_seconds=1"])
    without = cluster.nodes[1]
    cluster.execute(without, "mount", "-t", "tmpfs", "none", str(folder / "shared"))
    # The second attempt follows within the second, so the node itself waits for the end of the first.
    failed = f"grep -qs 'could not start' {run.run_dir}/logs/batch.log"
    comes_back = f"until {failed}; do sleep 0.01; done; umount {folder}/shared"
    cluster.execute(without, "sh", "-c", f"({comes_back}) >/dev/null 2>&1 &")
    env = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    words = [
        *run.command,
        "cluster.max_retries=1",
        f"cluster.slurm.options=['--nodelist={cluster.nodes[0]},{without}']",
    ]
    cluster.command("env", f"--chdir={folder}/shared/work", *(f"{k}={v}" for k, v in env.items()), *words)
    return run.wait_noted(attempt=2), without


def test_a_node_without_the_working_folder_is_named_within_seconds(folder_missing):
    run, without = folder_missing
    first = run.record.attempts[0]
    assert (first.kind, first.node) == ("node", without)
    assert first.cause.startswith(f"{without} could not start its processes") and "No such file" in first.cause
    assert first.noticed_at - first.started < 10


def test_the_run_goes_on_when_the_folder_is_back(folder_missing):
    assert len(folder_missing[0].record.attempts) == 2
    assert folder_missing[0].environment(1)["RANK"] == "1"


def test_a_partition_whose_limit_ends_at_the_warning_is_refused(cluster: SlurmCluster, inputs, tmp_path):
    run = NotedRun(inputs, tmp_path / "run", cluster, TWO_NODES)
    cluster.command("scontrol", "update", "partitionname=batch", "maxtime=2")
    done = run.rb()
    cluster.command("scontrol", "update", "partitionname=batch", "maxtime=infinite")
    assert done.returncode == 2 and not run.run_dir.exists()
    assert "the limit of partition batch is 2:00 (120 s) and cluster.slurm.warning_seconds 120" in done.stderr
