"""The one entry of worker processes: what it calls, and how it ends."""

import json
import time
from pathlib import Path

import pytest

from megatron_rb.app import worker
from megatron_rb.config.compose import CONFIG_FILE, save_config
from megatron_rb.config.schema import Config, ModelConfig, ParallelConfig, PlatformConfig
from megatron_rb.launch.workers import start_workers
from tests.parity.tiny_models import write_model

WORKED = "tests.unit.app.worked"
REPOSITORY = Path(__file__).resolve().parents[3]


class Left(Exception):
    """Stands for the end of a process."""


@pytest.fixture
def ends(monkeypatch):
    def leave(code: int) -> None:
        raise Left(code)

    monkeypatch.setattr(worker, "leave_at_once", leave)
    monkeypatch.setattr(worker, "show_log_lines", lambda: None)


@pytest.fixture
def two_ranks(tmp_path, monkeypatch) -> Path:
    """The folder of two tensor-parallel ranks, started in the repository."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    model = ModelConfig(str(write_model(tmp_path / "hf", "qwen3_vl", seed=0)), dtype="fp32")
    config = Config(name="two", model=model, parallel=ParallelConfig(tp_size=2), platform=PlatformConfig("cpu"))
    save_config(config, tmp_path / CONFIG_FILE)
    return tmp_path


@pytest.mark.timeout(120)
def test_a_function_of_a_session_gets_it_open(two_ranks):
    assert start_workers(f"{WORKED}:describe", two_ranks, 2) == 0
    found = [json.loads((two_ranks / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [item["name"] for item in found] == ["rank 0 (tp 0, pp 0, dp 0)", "rank 1 (tp 1, pp 0, dp 0)"]
    assert all(item["tp"] == [0, 1] and item["run"] == "two" and "|" not in item["layout"] for item in found)


@pytest.mark.timeout(120)
def test_wrong_input_is_a_sentence_and_an_exit_without_waiting_for_the_others(two_ranks):
    started = time.monotonic()
    assert start_workers(f"{WORKED}:wrong_on_rank_zero", two_ranks, 2) == 2
    assert time.monotonic() - started < 60
    log = (two_ranks / "logs/rank_0.log").read_text()
    assert "rb: " in log and "nonsense" in log and "Traceback" not in log


@pytest.mark.parametrize("flags", [[], ["--debug"]])
def test_workers_show_tracebacks_where_the_command_was_asked_to(monkeypatch, tmp_path, flags):
    started = []
    monkeypatch.setattr("megatron_rb.launch.workers.run_job", lambda job: started.append(job.arguments) or 0)
    monkeypatch.setattr("sys.argv", ["rb", *flags, "parity"])
    assert start_workers(f"{WORKED}:describe", tmp_path, 1) == 0
    assert started == [(f"{WORKED}:describe", str(tmp_path), *flags)]


@pytest.mark.parametrize(("function", "code", "said"), [("wrong", 2, "nonsense"), ("not_finite", 65, "loss is NaN")])
def test_foreseen_errors_have_a_code_of_their_own(ends, tmp_path, capsys, function, code, said):
    with pytest.raises(Left, match=f"^{code}$"):
        worker.main([f"{WORKED}:{function}", str(tmp_path)])
    err = capsys.readouterr().err
    assert err.startswith("rb: ") and said in err


@pytest.mark.parametrize(("words", "error"), [(["wrong", "--debug"], "nonsense"), (["broken"], "nobody has foreseen")])
def test_debug_and_what_was_not_foreseen_keep_their_traceback(ends, tmp_path, words, error):
    function, *flags = words
    with pytest.raises(ValueError, match=error):
        worker.main([*flags, f"{WORKED}:{function}", str(tmp_path)])


@pytest.mark.parametrize("target", [WORKED, f"{WORKED}:nothing", "no_such_module:run", "megatron_rb.no_such.part:run"])
def test_a_function_that_does_not_exist_is_named(target):
    with pytest.raises(ValueError, match=f"'{target}' names no function; write module:function"):
        worker.function_of(target)


def test_other_words_than_a_function_and_a_folder_are_refused(ends, capsys):
    with pytest.raises(Left, match="^2$"):
        worker.main([f"{WORKED}:wrong"])
    assert "a worker is told module:function and a folder" in capsys.readouterr().err


def test_a_session_without_settings_is_refused(ends, tmp_path, capsys):
    with pytest.raises(Left, match="^2$"):
        worker.main([f"{WORKED}:describe", str(tmp_path)])
    assert "needs the settings of its session" in capsys.readouterr().err
