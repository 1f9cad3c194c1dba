"""One job meets one fault after the other, and ends with the losses of a run that met none."""

import pytest

from tests.slurm.cluster import wait_for
from tests.slurm.runs import TinyRun, same_curve

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def spared(patient_cluster, inputs, tmp_path_factory):
    """Two nodes and a spare: a rank is killed, a rank hangs, a node loses its power."""
    settings = ["cluster=slurm", "cluster.nodes=2", "cluster.processes_per_node=1", "cluster.spare_nodes=1"]
    run = TinyRun(inputs, tmp_path_factory.mktemp("spared") / "run", patient_cluster, settings).start()
    run.wait_step(5)
    run.signal_ranks(run.nodes()[1], "KILL")
    run.wait_attempt(2)
    run.signal_ranks(run.nodes()[0], "STOP")
    run.wait_attempt(3)
    lost = run.nodes()[1]
    patient_cluster.power_off(lost)
    run.wait_state("COMPLETED")
    patient_cluster.power_on(lost)
    return run, lost


def test_faults_do_not_change_the_losses(spared, undisturbed):
    assert spared[0].losses() == same_curve(undisturbed)


def test_every_fault_is_recognised(spared):
    run, lost = spared
    assert run.kinds() == ["rank", "hang", "node", ""], run.story()
    killed, hung, gone, _ = run.record.attempts
    assert (killed.rank, killed.exit_code) == (1, 137)
    assert "made no progress" in hung.cause
    assert gone.node == lost and run.record.bad_nodes == [lost]
    assert lost not in run.nodes() and len(run.nodes()) == 2


def test_hang_leaves_the_stacks_of_every_rank(spared):
    folder = spared[0].run_dir / "stacks/attempt_2"
    stacks = [(folder / f"rank_{rank}.txt").read_text() for rank in range(2)]
    assert all("train/loop.py" in text and "Thread 0x" in text for text in stacks), stacks


@pytest.fixture(scope="module")
def unspared(impatient_cluster, inputs, tmp_path_factory):
    """No spare: a node reboots, the job is told that its time is over, the batch host loses its power."""
    settings = ["cluster=slurm", "cluster.nodes=2", "cluster.processes_per_node=1", "cluster.return_seconds=20"]
    run = TinyRun(inputs, tmp_path_factory.mktemp("unspared") / "run", impatient_cluster, settings).start()
    run.wait_step(3)
    rebooted = run.nodes()[1]
    impatient_cluster.power_off(rebooted)
    impatient_cluster.power_on(rebooted)
    run.wait_attempt(2)
    job_id = run.record.job_id
    impatient_cluster.command("scancel", "--batch", "--signal=USR1", job_id)
    run.wait_attempt(3)
    batch_host = run.nodes()[0]
    impatient_cluster.power_off(batch_host)
    run.wait_state("COMPLETED", seconds=120)
    impatient_cluster.power_on(batch_host)
    return run, rebooted, batch_host


def test_requeued_job_gives_the_same_losses(unspared, undisturbed):
    assert unspared[0].losses() == same_curve(undisturbed)


def test_reboot_warning_and_lost_batch_host_are_recognised(unspared):
    run, rebooted, batch_host = unspared
    notes = run.record.attempts
    assert [note.outcome for note in notes] == ["failed", "stopped", "failed", "finished"], run.story()
    assert notes[0].kind == "node" and notes[0].node == rebooted
    assert "batch script was lost" in notes[2].cause
    assert notes[2].resumed_from == notes[1].last_step > 0
    assert batch_host not in notes[3].nodes


@pytest.fixture(scope="module")
def split(impatient_cluster, inputs, tmp_path_factory):
    """The slurmd of the only node dies; its processes live on, deaf to the launcher, while the job runs elsewhere."""
    settings = ["cluster=slurm", "cluster.processes_per_node=2", "schedule.train_steps=400"]
    run = TinyRun(inputs, tmp_path_factory.mktemp("split") / "run", impatient_cluster, settings).start()
    run.wait_step(3)
    node, first = run.nodes()[0], run.record.attempts[0].id
    for part in ("launch.batch", "launch.agent"):
        impatient_cluster.execute(node, "pkill", "-STOP", "-f", f"{part} {run.run_dir}")
    impatient_cluster.kill_slurmd(node)
    run.wait_attempt(2, seconds=90)
    wait_for(lambda: "may not write" in _log(run), 40, run.story)
    impatient_cluster.execute(node, "pkill", "-CONT", "-f", f"megatron_rb.launch.* {run.run_dir}")
    second = run.nodes()[0]
    run.act("stop")
    impatient_cluster.power_off(node)
    impatient_cluster.power_on(node)
    return run, first, (node, second)


def test_writer_of_a_lost_node_is_fenced_off(split):
    run, first, (node, second) = split
    assert second != node
    assert f"attempt {first} may not write checkpoints any more" in _log(run)
    assert run.record.state == "STOPPED"


def _log(run: TinyRun) -> str:
    return (run.run_dir / "logs/rank_0.log").read_text()
