"""The ssh engine on the same machines: torchrun on each, a rank killed, a machine that loses its power."""

import pytest

from megatron_rb.bench.launch.runs import TinyRun
from tests.slurm.curves import same_curve

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def survived(cluster, inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ssh")
    hosts = folder / "hosts"
    hosts.write_text("# two and a spare\nnode1 slots=8 type=A800\nnode2 slots=8 type=A800\nnode3 slots=8 type=MTT\n")
    settings = [
        "cluster=ssh",
        f"cluster.ssh.hostfile={hosts}",
        f"cluster.ssh.options=[-F,{cluster.ssh_config}]",
        "cluster.nodes=2",
        "cluster.processes_per_node=1",
        "cluster.spare_nodes=1",
        "cluster.secrets=[TOKEN]",
        "cluster.type_env={MTT: {KIND: musa}, A800: {KIND: cuda}}",
    ]
    run = TinyRun(inputs, folder / "run", cluster, settings, env={"TOKEN": "se cret"}).start()
    run.wait_step(9)
    environments = [run.environment_of_rank("node1")]
    run.signal_ranks("node2", "KILL")
    run.wait_attempt(2)
    run.wait_step(10)
    cluster.power_off("node2")
    run.wait_attempt(3)
    environments.append(run.environment_of_rank("node3"))
    run.wait_state("COMPLETED")
    cluster.power_on("node2")
    return run, environments


def test_faults_do_not_change_the_losses_over_ssh(survived, undisturbed):
    assert survived[0].losses() == same_curve(undisturbed)


def test_faults_are_recognised_over_ssh(survived):
    run, _ = survived
    assert run.kinds() == ["rank", "node", ""], run.story()
    assert run.record.attempts[0].exit_code == 137
    assert run.nodes() == ["node1", "node3"]


def test_environment_follows_the_type_of_the_machine(survived):
    assert [environment["KIND"] for environment in survived[1]] == ["cuda", "musa"]


def test_secret_arrives_and_is_written_nowhere(survived):
    run, environments = survived
    assert {environment["TOKEN"] for environment in environments} == {"se cret"}
    files = [path for path in run.run_dir.rglob("*") if path.is_file()]
    assert files and not [path for path in files if b"se cret" in path.read_bytes()]


def test_host_that_does_not_answer_is_named(cluster, inputs, tmp_path):
    settings = ["cluster=ssh", "cluster.ssh.hosts=[nowhere.invalid]", "cluster.processes_per_node=2"]
    run = TinyRun(inputs, tmp_path / "run", cluster, settings)
    done = run.rb(f"cluster.ssh.options=[-F,{cluster.ssh_config}]")
    assert done.returncode == 2
    assert "host nowhere.invalid does not answer" in done.stderr
    assert not run.run_dir.exists()
