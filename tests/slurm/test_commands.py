"""What a user does with runs under Slurm: submit, look, stop, continue, sweep, chain."""

import json
import signal
import subprocess
import sys
import time

import pytest

from megatron_rb.bench.launch.cluster import ClusterOptions, wait_for
from megatron_rb.bench.launch.runs import REPOSITORY, TinyRun, launch, model_settings
from megatron_rb.launch import slurm
from tests.slurm.conftest import start_cluster

pytestmark = pytest.mark.timeout(200)
ONE_NODE = ["cluster=slurm", "cluster.processes_per_node=2"]
ONE_PROCESS = ["cluster=slurm", "parallel.pp_size=1", "parallel.layout=''", "cluster.processes_per_node=1"]


@pytest.fixture(scope="module")
def looked_after(cluster, inputs, tmp_path_factory):
    """A run that is watched, stopped, continued and ended; what every command said. torchrun starts its processes."""
    folder = tmp_path_factory.mktemp("commands")
    settings = [*ONE_NODE, "schedule.train_steps=2000", "cluster.launcher=torchrun"]
    run = TinyRun(inputs, folder / "run", cluster, settings)
    said = {"submit": run.rb()}
    run.wait_step(2)
    said["status"] = run.act("status")
    said["json"] = run.act("status", "--json")
    said["logs"] = run.act("logs")
    said["twice"] = run.rb()
    said["stop"] = run.act("stop")
    stopped_at = run.step
    said["stopped"] = run.act("status", "--json")
    said["other"] = run.rb("optimizer.lr=2e-3")
    run.start()
    run.wait_step(stopped_at + 1)
    said["now"] = run.act("stop", "--now")
    return run, said, stopped_at


def test_submit_prints_a_run_id_at_once(looked_after):
    run, said, _ = looked_after
    assert said["submit"].returncode == 0
    assert said["submit"].stdout.split() == [run.record.run_id]


def test_status_tells_state_and_step_to_people_and_to_scripts(looked_after):
    _, said, _ = looked_after
    status = json.loads(said["json"].stdout)
    assert status["state"] == "RUNNING" and status["step"] >= 2 and len(status["nodes"]) == 1
    assert "RUNNING" in said["status"].stdout and "step " in said["status"].stdout


def test_logs_show_the_steps(looked_after):
    assert "step 2/2000" in looked_after[1]["logs"].stdout


def test_second_run_in_a_folder_is_refused(looked_after):
    run, said, _ = looked_after
    assert said["twice"].returncode == 2
    assert f"run {run.record.run_id}" in said["twice"].stderr and "RUNNING already" in said["twice"].stderr


def test_stop_saves_first_and_the_same_command_continues(looked_after):
    run, said, stopped_at = looked_after
    assert said["stop"].returncode == 0, said["stop"].stderr
    status = json.loads(said["stopped"].stdout)
    assert (status["state"], status["last_checkpoint"]) == ("STOPPED", stopped_at)
    assert run.record.attempts[1].resumed_from == stopped_at


def test_stop_now_does_not_save(looked_after):
    run, said, stopped_at = looked_after
    assert said["now"].returncode == 0 and "STOPPED" in said["now"].stdout
    wait_for(lambda: slurm_word(run) == "CANCELLED", 30, lambda: f"the job is {slurm_word(run)}")  # after COMPLETING


def test_folder_of_another_config_is_refused(looked_after):
    _, said, _ = looked_after
    assert said["other"].returncode == 2
    assert "optimizer.lr is 0.001 there and 0.002 here; choose another run_dir" in said["other"].stderr


def test_wrong_data_is_not_tried_again(cluster, inputs, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    settings = [*ONE_PROCESS, f"data.train=[{tmp_path / 'empty.jsonl'}]"]
    run = TinyRun(inputs, tmp_path / "run", cluster, settings)
    done = run.rb("follow=true", timeout=100)
    assert done.returncode == 2, done.stdout + done.stderr
    assert run.kinds() == ["configuration"]
    assert "another attempt would fail as well" in run.status()["reason"]


def test_chain_of_stages_and_array_of_a_sweep(cluster, inputs, tmp_path):
    one = TinyRun(inputs, tmp_path / "one", cluster, [*ONE_PROCESS, "schedule.train_steps=2"]).start()
    init = one.run_dir / "checkpoints/step_00000002"
    settings = [*ONE_PROCESS, "schedule.train_steps=2", f"cluster.after={one.run_dir}", f"checkpoint.init={init}"]
    two = TinyRun(inputs, tmp_path / "two", cluster, settings).start()
    assert two.status()["state"] == "QUEUED"
    sweep = launch(
        *model_settings(inputs),
        *ONE_PROCESS,
        f"run_dir={tmp_path / 'sweep'}",
        "schedule.train_steps=2",
        "optimizer.lr=1e-3,1e-4",
        env=cluster.env,
    )
    assert sweep.returncode == 0, sweep.stderr
    two.wait_state("COMPLETED", 100)
    assert two.record.created > 0 and two.record.attempts[0].started >= one.record.ended
    runs = [TinyRun(inputs, tmp_path / "sweep" / str(number), cluster) for number in range(2)]
    for run in runs:
        run.wait_state("COMPLETED", 100)
    first, second = (run.losses() for run in runs)
    assert first[1] == second[1] and first[2] != second[2]


def test_killed_submit_leaves_no_second_job(cluster, inputs, tmp_path):
    run = TinyRun(inputs, tmp_path / "run", cluster, ["cluster=slurm", "cluster.nodes=4", "world_size=8"])
    words = [*model_settings(inputs), *run.settings, f"run_dir={run.run_dir}", "cluster.slurm.options=[--hold]"]
    submit = subprocess.Popen(
        [sys.executable, "-m", "megatron_rb.cli", "launch", *words],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=run.process_environment(),
    )
    wait_for(lambda: (run.run_dir / "launch.lock").exists() or submit.poll() is not None, 20)
    time.sleep(0.05)
    submit.send_signal(signal.SIGINT)
    submit.wait(20)
    run.rb("cluster.slurm.options=[--hold]")
    names = cluster.command("squeue", "-h", "-o", "%k").split()
    assert names.count(run.record.run_id) == 1
    run.act("stop", "--now")


def test_prolog_failure_is_named_and_can_be_released(cluster, inputs, tmp_path):
    cluster.broken_prolog.write_text("".join(f"{node}\n" for node in cluster.nodes))
    run = TinyRun(inputs, tmp_path / "run", cluster, [*ONE_PROCESS, "schedule.train_steps=1"]).start()
    wait_for(lambda: "held" in run.status()["reason"], 60, run.story)
    assert run.status()["state"] == "QUEUED"
    cluster.broken_prolog.unlink()
    for node in cluster.nodes:
        cluster.command("scontrol", "update", f"nodename={node}", "state=resume", check=False)
    assert run.act("requeue").returncode == 0
    run.wait_state("COMPLETED", 60)


def test_with_accounting_a_forgotten_job_still_has_a_state(one_at_a_time, monkeypatch):
    options = ClusterOptions(nodes=1, accounting=True, extra=("MinJobAge=2",))
    with start_cluster(options) as cluster:
        job = cluster.command("sbatch", "--parsable", "--output=/dev/null", "--wrap=exit 3").strip()
        monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
        wait_for(lambda: not cluster.command("squeue", "-h", "-t", "all", "-j", job, check=False).strip(), 90)
        found = slurm.job_state(job)
    assert found is not None and (found.state, found.word) == ("FAILED", "FAILED")


def slurm_word(run: TinyRun) -> str:
    assert run.cluster is not None
    return run.cluster.command("squeue", "-h", "-t", "all", "-j", run.record.job_id, "-o", "%T").strip()
