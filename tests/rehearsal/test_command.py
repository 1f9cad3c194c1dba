"""`rb rehearse` as its user meets it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_rb import cli
from megatron_rb.shapes.shape import load_shape
from tests.parity.tiny_models import write_model
from tests.rehearsal.conftest import request_of


@pytest.fixture
def words(tmp_path):
    hf = write_model(tmp_path / "hf", "qwen3_vl", seed=1)
    shape = load_shape(hf)
    layout = f"P v*{shape.vision.num_layers} M E t*1 | t*{shape.text.num_layers - 1} L"
    return [*request_of(hf, layout, "name=tiny_run", pp=2).settings, "--mix", "tiny", "--micro-batches", "2"]


@pytest.mark.timeout(120)
def test_a_rehearsal_is_printed_and_written_as_json_and_as_a_page(words, tmp_path, capsys):
    files = tmp_path / "out.json", tmp_path / "out.html"
    assert cli.main(["rehearse", *words, "--no-compile", "--json", str(files[0]), "--html", str(files[1])]) == 0
    text = capsys.readouterr().out
    assert "tiny_run: 2 processes = pp 2 x dp 1" in text and "every message and every collective has its other" in text
    assert "the host waits 2 times a step" in text
    written = json.loads(files[0].read_text())
    assert written["sound"] and [stage["pp_rank"] for stage in written["stages"]] == [0, 1]
    page = files[1].read_text()
    assert page.count('class="bar"') == 2 and "Everything fits" in page and "<script" not in page


@pytest.mark.timeout(120)
def test_stages_of_which_no_rank_was_asked_for_are_named(words, tmp_path, capsys):
    page = tmp_path / "out.html"
    assert cli.main(["rehearse", *words, "--no-compile", "--ranks", "0", "--html", str(page)]) == 0
    text = capsys.readouterr().out
    assert "pipeline rank 1 was not rehearsed" in text and "every message and every" not in text
    assert "pipeline rank 1 was not rehearsed" in page.read_text()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_a_rehearsal_that_is_ended_half_way(how, words, tmp_path):
    places = {"TMPDIR": str(tmp_path / "a b"), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    (tmp_path / "a b").mkdir()
    command = [sys.executable, "-m", "megatron_rb.cli", "rehearse", *words, "--steps", "500", "--no-compile"]
    report = tmp_path / "out.json"
    command = [*command, "--json", str(report)]
    started = subprocess.Popen(command, env=os.environ | places, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    workers = _children(started.pid)
    while not workers:
        time.sleep(0.1)
        workers = _children(started.pid)
    started.send_signal(how)
    try:
        _, said = started.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        started.send_signal(signal.SIGABRT)  # it tells where it is
        pytest.fail(started.communicate()[1].decode())
    while any(_runs(worker) for worker in workers):
        time.sleep(0.1)
    assert not report.exists()
    if how != signal.SIGKILL:
        assert (started.returncode, said.decode().strip()) == (130, "rb: stopped; nothing was written")
        assert not list((tmp_path / "a b").glob("rehearsal-*"))


def _children(pid: int) -> list[int]:
    """Workers of a rehearsal that have started."""
    children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [child for child in children if b"megatron_rb.app.worker" in _command_of(child)]


def _command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()  # empty of a process that has ended
    except FileNotFoundError:
        return b""


def _runs(pid: int) -> bool:
    return bool(_command_of(pid))


@pytest.mark.timeout(120)
def test_a_run_that_does_not_fit_ends_with_1(words, tmp_path, capsys):
    device = tmp_path / "small.yaml"
    assert cli.main(["rehearse", *words, "--no-compile", "--device", str(_device(device, "3.001e9"))]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


def _device(path, memory):
    from importlib import resources

    text = (resources.files("megatron_rb.conf") / "device" / "h100.yaml").read_text()
    path.write_text(
        "\n".join(f"memory: {memory}" if line.startswith("memory:") else line for line in text.splitlines())
    )
    return path


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--device", "no_memory.yaml"], "of which its libraries take 3 (reserved_memory)"),
        (["--ranks", "7"], "--ranks names rank 7; the run has the ranks 0 to 1"),
        (["--ranks", "1-0"], "--ranks '1-0' is not understood; write all, classes, or numbers as 0,8-15"),
        (["--steps", "0"], "--steps is 0"),
        (["--processes", "-3"], "--processes is -3; give 1 or more, or leave it out"),
        (["--json", "no_memory.yaml/out.json"], "no_memory.yaml is no folder; name another place"),
        (["--html", "."], ". is a folder; name a file in it"),
        (["--json", "same", "--html", "same"], "--json and --html both name same; give each a file of its own"),
        (["--data", "none.json", "--mix", ""], "there is no histogram none.json"),
        (
            ["--data", "large.json", "--mix", ""],
            "samples of the data of large.json are over 1536 tokens or 6144 patches",
        ),
        (["platform.name=musa", "--device", "h200"], "the run asks for platform musa; name another with --device"),
        (["platform.name=cuda", "--device", "mtt_s5000"], "S5000 is a device of platform musa, and the run asks for"),
        (["--device", "cpu"], "is a device of platform cpu, and it cannot be rehearsed"),
        (["platform.name=musa", "--with", "flash_attn"], "flash_attn has no release for musa"),
        (["data.seq_length=64", "data.max_patches=64"], "raise seq_length or max_patches"),
    ],
)
def test_wrong_words_are_one_sentence_before_anything_starts(words, more, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _device(tmp_path / "no_memory.yaml", "2e9")
    (tmp_path / "large.json").write_text('{"text_tokens": [90, 30000], "patches": [0, 0], "counts": [1, 1]}')
    assert cli.main(["rehearse", *words, *more]) == 2
    assert sentence in capsys.readouterr().err.replace("\n", " ")


def test_the_table_of_all_recipes_is_refused_a_place_that_is_no_folder_before_it_is_made(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["rehearse", "--recipes", str(tmp_path / "file" / "table")]) == 2
    assert "is no folder; name another place" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("more", [["experiment=robobrain20_7b_stage1"], ["--steps", "2"], ["--json", "all.json"]])
def test_the_table_of_all_recipes_takes_no_other_choice(more, tmp_path, capsys):
    assert cli.main(["rehearse", *more, "--recipes", str(tmp_path / "table")]) == 2
    assert "--recipes rehearses every recipe as it is; leave out settings and other options" in capsys.readouterr().err
    assert not (tmp_path / "table").exists()
