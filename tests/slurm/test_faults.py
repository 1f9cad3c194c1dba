"""One job meets one fault after the other, and ends with the losses of a run that met none."""

import contextlib
import re

import pytest

from megatron_rb.bench.launch.cluster import SlurmCluster, wait_for
from megatron_rb.bench.launch.runs import TinyRun
from tests.slurm.curves import same_curve

pytestmark = pytest.mark.timeout(400)
ODD = "a 'b'  \"c\" $HOME\n`two` \\ lines é"


@pytest.fixture(scope="module")
def spared(cluster, inputs, tmp_path_factory):
    """Two nodes and a spare: a rank is killed, the disk is full, a rank hangs, a node loses its power."""
    disk = cluster.small_disk
    settings = [
        "cluster=slurm",
        "cluster.nodes=2",
        "cluster.processes_per_node=1",
        "cluster.spare_nodes=1",
        f"checkpoint.dir={disk}/checkpoints",
    ]
    folder = tmp_path_factory.mktemp("spared")
    run = TinyRun(inputs, folder / "run", cluster, [*settings, f"cluster.env={{ODD: {_quoted(ODD)}}}"])
    run.start()
    run.wait_step(9)
    run.signal_ranks(run.nodes()[1], "KILL")
    run.wait_attempt(2)
    fill(disk / "ballast")
    wait_for(lambda: run.record.attempts[1].ended is not None, 60, run.story)
    published = sorted(
        path.name for path in (disk / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d+", path.name)
    )
    (disk / "ballast").unlink()
    run.wait_attempt(3)
    run.wait_step(17)
    environment = run.environment_of_rank(run.nodes()[1])
    run.signal_ranks(run.nodes()[1], "STOP")
    run.wait_attempt(4)
    lost = run.nodes()[1]
    cluster.power_off(lost)
    run.wait_state("COMPLETED")
    cluster.power_on(lost)
    return run, lost, published, environment


def test_faults_do_not_change_the_losses(spared, undisturbed):
    assert spared[0].losses() == same_curve(undisturbed)


def test_every_fault_is_recognised(spared):
    run, lost, _, _ = spared
    assert run.kinds() == ["rank", "rank", "hang", "node", ""], run.story()
    killed, _, hung, gone, _ = run.record.attempts
    assert (killed.rank, killed.exit_code) == (1, 137)
    assert "made no progress" in hung.cause
    assert gone.node == lost and run.record.bad_nodes == [lost]
    assert lost not in run.nodes() and len(run.nodes()) == 2


def test_full_disk_publishes_no_half_written_checkpoint(spared):
    run, _, published, _ = spared
    assert published, run.story()
    assert run.record.attempts[1].phase == "checkpoint"
    assert run.record.attempts[2].resumed_from == int(published[-1].removeprefix("step_"))


def test_hang_leaves_the_stacks_of_every_rank(spared):
    folder = spared[0].run_dir / "stacks/attempt_3"
    stacks = [(folder / f"rank_{rank}.txt").read_text() for rank in range(2)]
    assert all("train/loop.py" in text and "hread 0x" in text for text in stacks), stacks


def test_environment_value_arrives_unchanged(spared):
    assert spared[3]["ODD"] == ODD


@pytest.fixture(scope="module")
def unspared(cluster, inputs, tmp_path_factory):
    """No spare: a node reboots, the job is warned that its time is over, its batch host and a node lose their power.

    Meanwhile the slurmd of another job's only node dies. Its processes live on, deaf to the launcher.
    """
    folder = tmp_path_factory.mktemp("unspared")
    settings = ["cluster=slurm", "cluster.processes_per_node=2", "schedule.train_steps=4000"]
    split = TinyRun(inputs, folder / "split", cluster, settings).start()
    settings = ["cluster=slurm", "cluster.nodes=2", "cluster.processes_per_node=1", "cluster.return_seconds=6"]
    split.wait_attempt(1)
    deaf = split.nodes()[0]
    for part in ("launch.batch", "launch.agent"):
        cluster.execute(deaf, "pkill", "-STOP", "-f", f"{part} {split.run_dir}")
    cluster.kill_slurmd(deaf)
    cluster.declare_lost(deaf)
    run = TinyRun(inputs, folder / "run", cluster, settings).start()
    run.wait_step(3)
    rebooted = run.nodes()[1]
    cluster.power_off(rebooted)
    cluster.power_on(rebooted)
    run.wait_attempt(2)
    cluster.command("scancel", "--batch", "--signal=USR1", run.record.job_id)
    split.wait_attempt(2)
    wait_for(lambda: "may not write" in _log(split), 40, split.story)
    fenced = split.record.attempts[0].id
    split.act("stop", "--now")
    cluster.power_off(deaf)
    cluster.power_on(deaf)
    run.wait_attempt(3)
    batch_host = run.nodes()[0]
    _lose(cluster, run, batch_host)
    run.wait_attempt(4)
    lost = run.nodes()[1]
    _lose(cluster, run, lost)
    run.wait_attempt(5)
    run.wait_state("COMPLETED")
    for node in (batch_host, lost):
        cluster.power_on(node)
    return run, (rebooted, batch_host, lost), split, fenced


def test_requeued_job_gives_the_same_losses(unspared, undisturbed):
    assert unspared[0].losses() == same_curve(undisturbed)


def test_lost_machines_without_a_spare_are_recognised(unspared):
    run, (rebooted, batch_host, lost), _, _ = unspared
    notes = run.record.attempts
    assert [note.outcome for note in notes] == ["failed", "stopped", "failed", "failed", "finished"], run.story()
    assert notes[0].kind == "node" and notes[0].node == rebooted
    assert "batch script was lost" in notes[2].cause
    assert notes[2].resumed_from == notes[1].last_step > 0
    assert batch_host not in notes[3].nodes
    assert notes[3].kind == "node" and notes[3].node == lost
    assert lost not in notes[4].nodes


def test_writer_of_a_lost_node_is_fenced_off(unspared):
    _, _, split, fenced = unspared
    assert f"attempt {fenced} may not write checkpoints any more" in _log(split)
    assert split.record.state == "STOPPED"
    assert split.record.attempts[0].nodes != split.record.attempts[1].nodes


def fill(file) -> None:
    """Take what is left of a file system."""
    with contextlib.suppress(OSError), open(file, "wb", buffering=0) as ballast:
        while True:
            ballast.write(bytes(1 << 16))


def _lose(cluster: SlurmCluster, run: TinyRun, node: str) -> None:
    """Power off a node; Slurm learns of it only after the launcher has acted."""
    cluster.power_off(node)
    job = ("squeue", "-h", "-j", run.record.job_id, "-t", "all", "-o", "%T")
    wait_for(lambda: cluster.command(*job).strip() != "RUNNING", 40, run.story)
    cluster.declare_lost(node)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "\\'") + "'"


def _log(run: TinyRun) -> str:
    return (run.run_dir / "logs/rank_0.log").read_text()
