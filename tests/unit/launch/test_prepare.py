"""What is known to be wrong before anything starts is one clear sentence, and leaves nothing behind."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_rb import cli
from megatron_rb.config.compose import expand_sweep
from megatron_rb.config.on_cpu import ACCELERATORS_ONLY, INTERPRETED
from megatron_rb.kernels.dispatch import TABLE
from megatron_rb.launch.folder import nothing_left_behind
from megatron_rb.launch.local import free_port


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch) -> list[str]:
    vision = dict(depth=2, hidden_size=64, num_heads=4, intermediate_size=96, patch_size=14, temporal_patch_size=2)
    vision |= dict(spatial_merge_size=2, out_hidden_size=64, window_size=112, fullatt_block_indexes=[1])
    text = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=256)
    text |= dict(num_key_value_heads=2, rope_scaling={"mrope_section": [2, 3, 3]})
    text |= dict(image_token_id=1, video_token_id=2, vision_start_token_id=3, vision_end_token_id=4)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", "vision_config": vision, **text}))
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "empty").mkdir()
    for name in ("step_00000009", "step_00000020", "step_00000030.writing-1"):
        (tmp_path / "run" / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "run" / "checkpoints" / name / "checkpoint.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return ["model.hf_path=hf", "data.train=[a.jsonl]", "run_dir=r", "platform=cpu"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["data.train=[b.jsonl]"], "data.train: there is no b.jsonl"),
        (["checkpoint.init=nowhere"], "checkpoint.init: there is no nowhere"),
        (["cluster.nodes=2", "cluster.processes_per_node=1"], "use cluster=ssh or cluster=slurm"),
        (["cluster=ssh"], "give cluster.ssh.hostfile=FILE or cluster.ssh.hosts=[a,b]"),
        (["cluster=ssh", "cluster.ssh.hosts=[a]", "cluster.spare_nodes=1"], "need 2 hosts, 1 are given"),
        (["cluster=ssh", "cluster.ssh.hosts=[a]", "cluster.node_env.b.A=1"], "names b, which is none of the hosts a"),
        (["cluster.secrets=[NO_SUCH_VARIABLE]"], "names NO_SUCH_VARIABLE, which is not set here"),
        (["cluster.env.RANK=1"], "cluster.env must not set RANK"),
        (
            ["cluster=slurm", "cluster.launcher=direct"],
            "cluster.launcher direct does not start runs of cluster=slurm",
        ),
        (["cluster=slurm", "cluster.slurm.template=t.j2"], "cluster.slurm.template: there is no t.j2"),
        (["cluster=slurm", "cluster.after=elsewhere"], "elsewhere is not the folder of a submitted run"),
        (["cluster=slurm", "cluster.slurm.time=2"], "time is 2 (120 s) and cluster.slurm.warning_seconds 120"),
        (["cluster=slurm", "cluster.slurm.time=30s"], "cluster.slurm.time: '30s' is no time of Slurm"),
        (["cluster=slurm", "cluster.slurm.srun_options=['--export=NONE']"], "srun_options holds --export=NONE"),
        (["cluster.slurm.partitoin=x"], "did you mean cluster.slurm.partition"),
        (["follow=maybe"], "follow must be true or false"),
        (["action=stop"], "action is given twice, as dryrun and as stop; leave one of them out"),
        (["optimizer.lr=1e-5", "optimizer.min_lr=1e-4"], "optimizer.min_lr 0.0001 is larger than optimizer.lr 1e-05"),
        (["schedule.train_steps=3", "metrics.profile.steps=[2,9]"], "names step 9; the run has 3 steps"),
        (["metrics.profile.memory=true"], "platform=cpu keeps no history of its memory; set it to false"),
        (
            ["kernels.mrope=triton"],
            "runs on platform=cpu in Triton's interpreter only; use auto, or cluster.env.TRITON",
        ),
        (["kernels.varlen_attention=flash_attn"], "flash_attn does not run on platform=cpu; use auto"),
        (["model.layers=transformer_engine"], "model.layers transformer_engine does not run on platform=cpu"),
        (
            ["platform=cuda", "model.dtype=fp32", "model.layers=transformer_engine"],
            "use model.dtype=bf16 or model.layers",
        ),
        (["metrics.profile.dir=a.jsonl", "metrics.profile.steps=[1]"], "a.jsonl is not a folder; name another one"),
        (["metrics.profile.dir=/proc/x", "metrics.profile.steps=[1]"], "nothing can be written in /proc"),
        (["metrics.capture.dir=a.jsonl/x", "metrics.capture.every=1"], "a.jsonl is not a folder; name another one"),
        (["checkpoint.dir=a.jsonl"], "checkpoint.dir a.jsonl: "),
        (["run_dir=a.jsonl/r"], "run_dir a.jsonl/r: "),
        (["cluster.python=/nonexistent/python"], "/nonexistent/python is not a program that can be started"),
        (["cluster.python=a.jsonl"], "cluster.python a.jsonl is not a program that can be started"),
        (["cluster.python=/bin/true"], "cluster.python /bin/true is no Python with megatron_rb: it says nothing"),
        (["checkpoint.init=empty"], "checkpoint.init 'empty' is neither a checkpoint nor a Hugging Face folder"),
        (
            ["checkpoint.init=run"],
            "the folder of a run, whose weights change; name one of its checkpoints, the newest is "
            "run/checkpoints/step_00000020",
        ),
        (["checkpoint.init=run/checkpoints"], "the newest is run/checkpoints/step_00000020"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_left(inputs, capsys, settings: list[str], words: str):
    assert cli.main(["launch", *inputs, "action=dryrun", *settings]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not Path("r").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["action=runn"], "there is no action 'runn'; did you mean run?"),
        (["action=logs"], "r is not the folder of a run"),
    ],
)
def test_action_that_cannot_be_is_one_sentence(inputs, capsys, settings: list[str], words: str):
    assert cli.main(["launch", *inputs, *settings]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not Path("r").exists()


@pytest.mark.parametrize("rank", ["-1", "1"])
def test_log_of_a_rank_that_is_not_there_is_refused(inputs, capsys, rank: str):
    assert cli.main(["launch", *inputs, "action=dryrun"]) == 0
    assert cli.main(["launch", "run_dir=r", "action=logs", "--rank", rank]) == 2
    assert f"there is no rank {rank}; the run has ranks 0 to 0" in capsys.readouterr().err


def test_port_in_use_is_named(inputs, capsys):
    import socket

    port = free_port("127.0.0.1")
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", port))
        holder.listen()
        assert cli.main(["launch", *inputs, f"cluster.master_port={port}"]) == 2
    assert f"port {port} of 127.0.0.1 is in use" in " ".join(capsys.readouterr().err.split())
    assert not Path("r").exists()


@pytest.mark.parametrize("engine", ["local", "ssh", "slurm"])
def test_dry_run_of_every_engine_is_fast_and_complete(inputs, engine: str):
    words = [*inputs, f"cluster={engine}", *(["cluster.ssh.hosts=[a]"] if engine == "ssh" else [])]
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "megatron_rb.cli", "launch", *words, "action=dryrun"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "SLURM_CONF": "", "PATH": "/usr/bin:/bin"},
        timeout=60,
    )
    seconds = time.monotonic() - started
    if engine == "slurm" and "Slurm" in done.stderr:
        pytest.skip("Slurm's commands are here, but no cluster")
    assert done.returncode == 0, done.stderr
    script = {"local": "ranks.txt", "ssh": "hosts/a.sh", "slurm": "job.sbatch"}[engine]
    for name in (script, "ranks.txt", "environment.sh", "job.json"):
        assert (Path("r/launch") / name).is_file()
    assert seconds < 10, "2 s on a machine with nothing else to do"


def test_a_published_model_is_looked_at_without_its_folder_and_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["launch", "model=robobrain20_7b", "parallel=tp2_pp2", "platform=cpu", "run_dir=r"]
    assert cli.main([*words, "action=dryrun"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "predicted peak memory of a rank by pipeline stage" in text
    assert "still missing: the weights of RoboBrain2.0-7B are not here" in text and "at models/RoboBrain2.0-7B" in text
    assert "still missing: data.train is empty" in text
    assert cli.main(words) == 2
    assert "the weights of RoboBrain2.0-7B are not here" in " ".join(capsys.readouterr().err.split())


def test_folder_that_was_there_stays(tmp_path):
    (tmp_path / "r").mkdir()
    with pytest.raises(KeyboardInterrupt), nothing_left_behind(tmp_path / "r"):
        raise KeyboardInterrupt
    assert (tmp_path / "r").is_dir()


def test_new_folder_goes_with_the_failure_and_so_do_its_parents(tmp_path):
    with pytest.raises(KeyboardInterrupt), nothing_left_behind(tmp_path / "a/b/r"):
        (tmp_path / "a/b/r/launch").mkdir(parents=True)
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_sweep_is_every_combination():
    words = ["optimizer.lr=1e-3,1e-4", "seed=1,2", "parallel.layout=P v,x", "model.hf_path=hf"]
    found = expand_sweep(words)
    assert len(found) == 4
    assert found[1] == ["optimizer.lr=0.001", "seed=2", "parallel.layout=P v,x", "model.hf_path=hf"]


@pytest.mark.parametrize(
    "settings",
    [
        ["kernels.mrope=triton", "cluster.env.TRITON_INTERPRET=1"],
        ["platform=cuda", "kernels.varlen_attention=flash_attn", "kernels.mrope=triton", "metrics.profile.memory=true"],
        ["checkpoint.init=run/checkpoints/step_00000009"],
        ["metrics.profile.dir=new/deep/folder", "metrics.profile.steps=[1]"],
        ["metrics.profile.dir=a.jsonl"],
        [f"cluster.python={sys.executable}"],
        ["cluster=ssh", "cluster.ssh.hosts=[a]", "cluster.python=/only/there/python"],
    ],
)
def test_what_can_be_meant_is_taken(inputs, settings: list[str]):
    assert cli.main(["launch", *inputs, "action=dryrun", *settings]) == 0
    assert not Path("new").exists()


def test_what_a_cpu_cannot_compute_is_what_the_table_of_kernels_says():
    for operator, rows in TABLE.items():
        if operator == "qk_norm_mrope":  # follows kernels.mrope
            continue
        never = tuple(row.name for row in rows if "cpu" not in row.default_on + row.on_request)
        interpreted = [row.name for row in rows if "cpu" in row.on_request]
        assert ACCELERATORS_ONLY.get(f"kernels.{operator}", ()) == never
        assert [INTERPRETED[key] for key in [f"kernels.{operator}"] if key in INTERPRETED] == interpreted


def test_degrees_that_do_not_fit_a_published_model_are_refused_without_its_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["launch", "experiment=robobrain20_3b_stage1", "parallel.tp_size=4"]) == 2
    assert "rb: tp_size 4 does not divide num_query_groups 2; use 1 or 2" in capsys.readouterr().err
