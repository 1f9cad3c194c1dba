"""The `rb` command as its user meets it: help without torch, one sentence for wrong input."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rb import cli
from megatron_rb.config.compose import config_from_file, load_config
from megatron_rb.launch.folder import own_folder


def rb(*arguments: str, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    return subprocess.run(
        [sys.executable, "-m", "megatron_rb.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=env,
        timeout=60,
    )


def test_every_command_has_a_line_of_help():
    assert {"launch", "train"} <= set(cli.COMMANDS)
    assert all(command.summary.endswith(".") for command in cli.COMMANDS.values())


def test_unknown_command_suggests_the_closest(capsys):
    assert cli.main(["lunch"]) == 2
    assert "rb has no command 'lunch'; did you mean launch?" in capsys.readouterr().err


def test_wrong_setting_is_one_sentence_before_anything_starts(tmp_path: Path):
    done = rb("launch", "experiment=demo", "parallel.tpp_size=2", cwd=tmp_path)
    assert done.returncode == 2
    assert "there is no setting 'parallel.tpp_size'; did you mean parallel.tp_size" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(tmp_path: Path):
    done = rb("--debug", "launch", "parallel.tpp_size=2", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_version_is_told(capsys):
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"megatron-rb \S.*\n", capsys.readouterr().out)


def test_output_that_nobody_reads_is_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-m", "megatron_rb.cli", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=env, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_another_pipe_that_breaks_keeps_its_traceback(monkeypatch):
    def broken(settings: list[str]) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("megatron_rb.tools.launch.load_config", broken)
    with pytest.raises(BrokenPipeError):
        cli.main(["launch"])


def test_full_disk_is_one_sentence_with_the_place(monkeypatch, capsys):
    def full(settings: list[str]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/a/config.yaml")

    monkeypatch.setattr("megatron_rb.tools.launch.load_config", full)
    assert cli.main(["launch"]) == 74
    assert "rb: runs/a/config.yaml cannot be written: No space left on device" in capsys.readouterr().err


def test_error_of_another_package_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("megatron_rb.tools.launch.load_config", lambda settings: json.loads("{"))
    with pytest.raises(json.JSONDecodeError):
        cli.main(["launch"])


def test_missing_model_folder_is_named(tmp_path: Path):
    done = rb("launch", "model.hf_path=nowhere", cwd=tmp_path)
    assert (done.returncode, "nowhere/config.json" in done.stderr) == (2, True)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    vision = dict(depth=2, hidden_size=64, num_heads=4, intermediate_size=96, patch_size=14, temporal_patch_size=2)
    vision |= dict(spatial_merge_size=2, out_hidden_size=64, window_size=112, fullatt_block_indexes=[1])
    text = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=256)
    text |= dict(num_key_value_heads=2, rope_scaling={"mrope_section": [2, 3, 3]})
    text |= dict(image_token_id=1, video_token_id=2, vision_start_token_id=3, vision_end_token_id=4)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", "vision_config": vision, **text}))
    return tmp_path / "hf"


def test_dry_run_writes_and_prints_the_folder_and_starts_nothing(model: Path, tmp_path: Path):
    (tmp_path / "a.jsonl").touch()
    settings = [f"model.hf_path={model}", "parallel=tp2", "cluster.env.A=b c", "data.train=[a.jsonl]", "run_dir=r"]
    done = rb("launch", "--dry-run", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "export A='b c'" in done.stdout
    assert [line.split() for line in (tmp_path / "r/launch/ranks.txt").read_text().splitlines()] == [
        ["rank", "node", "local_rank", "tp", "cp", "dp", "pp"],
        ["0", "localhost", "0", "0", "0", "0", "0"],
        ["1", "localhost", "1", "1", "0", "0", "0"],
    ]
    assert not (tmp_path / "r/run.json").exists()


def test_degrees_that_do_not_fit_the_model_are_refused(model: Path, tmp_path: Path):
    done = rb("launch", f"model.hf_path={model}", "parallel.tp_size=4", cwd=tmp_path)
    assert done.returncode == 2
    assert "tp_size 4 does not divide num_query_groups 2; use 1 or 2" in done.stderr


def test_run_folder_in_use_is_refused(tmp_path: Path):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from pathlib import Path; from megatron_rb.launch.folder import own_folder\n"
            "with own_folder(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)",
            str(tmp_path / "run"),
        ],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(ValueError, match=rf"in use by another launch \(process {holder.pid}\)"),
            own_folder(tmp_path / "run"),
        ):
            raise AssertionError("two launches share a folder")
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with own_folder(tmp_path / "run"):
        assert (tmp_path / "run/launch.lock").read_text() == str(os.getpid())


def test_launch_writes_the_config_and_starts_every_rank_from_it(model: Path, tmp_path: Path, monkeypatch, capfd):
    (tmp_path / "dummy_worker.py").write_text("import os, sys; print(os.environ['RANK'], sys.argv[1:])")
    monkeypatch.setattr("megatron_rb.launch.prepare.WORKER", "dummy_worker")
    run_dir, data = tmp_path / "a run", tmp_path / "a.jsonl"
    data.touch()
    settings = [f"model.hf_path={model}", "parallel=tp2", f"run_dir={run_dir}", f"data.train=[{data}]"]
    settings.append(f"cluster.env.PYTHONPATH={tmp_path}")
    assert cli.main(["launch", *settings]) == 0
    arguments = ["megatron_rb.app.main:train_folder", str(run_dir)]
    assert (run_dir / "logs/rank_1.log").read_text() == f"1 {arguments}\n"
    assert f"0 {arguments}" in capfd.readouterr().out
    assert config_from_file(run_dir / "config.yaml") == load_config(settings)
