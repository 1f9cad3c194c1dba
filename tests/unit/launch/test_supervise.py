"""What the launcher does with real processes (small scripts instead of trainers)."""

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rb.launch.failure import describe_exit
from megatron_rb.launch.job import JobSpec, Patience
from megatron_rb.launch.main import run_job
from megatron_rb.launch.supervise import last_words

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., JobSpec]:
    """Makes a job whose worker is the given script; `rank` and `wait_for` are at hand in it."""

    def build(script: str, processes: int = 3, grace_seconds: float = 20.0, **env: str) -> JobSpec:
        prelude = (
            "import os, signal, sys, time, pathlib\n"
            "rank = int(os.environ['RANK'])\n"
            f"folder = pathlib.Path({str(tmp_path)!r})\n"
            "(folder / f'pid_{rank}').write_text(str(os.getpid()))\n"
        )
        (tmp_path / "dummy_worker.py").write_text(prelude + script)
        path = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
        return JobSpec(
            "dummy_worker",
            (),
            processes,
            tmp_path,
            env={"PYTHONPATH": path, **env},
            patience=Patience(grace=grace_seconds),
        )

    return build


def start_launcher(job: JobSpec, **popen: object) -> "subprocess.Popen[bytes]":
    """A launcher in a process of its own, to send signals to."""
    code = (
        "import sys; from pathlib import Path; from megatron_rb.launch.job import JobSpec, Patience;"
        "from megatron_rb.launch.main import run_job;"
        f"sys.exit(run_job(JobSpec({job.module!r}, (), {job.processes}, Path({str(job.run_dir)!r}),"
        f" env={dict(job.env)!r}, patience=Patience(grace={job.patience.grace}))))"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, **popen)  # type: ignore[call-overload]
    wait_until(lambda: all(ready_file(job, rank).is_file() for rank in range(job.processes)))
    return launcher


def ready_file(job: JobSpec, rank: int) -> Path:
    return job.run_dir / f"ready_{rank}"


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def pids(job: JobSpec) -> list[int]:
    return [int((job.run_dir / f"pid_{rank}").read_text()) for rank in range(job.processes)]


def assert_nobody_left(job: JobSpec) -> None:
    wait_until(lambda: not any(alive(pid) for pid in pids(job)), seconds=10)


READY = "(folder / f'ready_{rank}').write_text('')\n"
SLEEP = READY + "time.sleep(60)\n"
NOTE_SIGNAL = (
    "def note(signum, frame):\n"
    "    (folder / f'got_{rank}').write_text(str(signum))\n"
    "    sys.exit(0)\n"
    "for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1): signal.signal(s, note)\n"
)
DEAF = "for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1): signal.signal(s, signal.SIG_IGN)\n"


def test_all_ranks_finish(job, capfd):
    spec = job("print('hello from', rank)")
    assert run_job(spec) == 0
    assert [(spec.run_dir / "logs" / f"rank_{r}.log").read_text() for r in range(3)] == [
        f"hello from {r}\n" for r in range(3)
    ]
    assert capfd.readouterr().out == "hello from 0\n"


def test_environment_values_arrive_with_spaces_and_quotes(job):
    spec = job("print(os.environ['FLAGS'])", processes=1, FLAGS="-a 'b  c' \"$HOME\" é")
    run_job(spec)
    assert (spec.run_dir / "logs/rank_0.log").read_text() == "-a 'b  c' \"$HOME\" é\n"


def test_first_failure_ends_the_world_and_is_explained(job, capfd):
    all_there = "while len(list(folder.glob('pid_*'))) < 3: time.sleep(0.01)\n"
    spec = job(f"if rank == 1:\n    {all_there}    raise KeyError('no such camera')\n" + SLEEP)
    started = time.monotonic()
    assert run_job(spec) == 1
    assert time.monotonic() - started < 15
    error = capfd.readouterr().err
    assert "rank 1 failed with exit code 1" in error
    assert "Traceback" in error and "KeyError: 'no such camera'" in error
    assert "stopping 2 other ranks" in error
    assert_nobody_left(spec)


def test_exit_code_of_the_failed_rank_is_the_launchers(job, capfd):
    assert run_job(job("print('the end is near'); sys.exit(75 if rank == 2 else 0)")) == 75
    assert "the end is near" in capfd.readouterr().err


def test_wrong_input_of_one_rank_explains_the_other_that_broke_off_first(job, capfd):
    found = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))\n" + READY + "time.sleep(60)\n"
    wait = "while not (folder / 'ready_0').exists(): time.sleep(0.01)\n"
    spec = job(f"if rank == 1:\n    {wait}    sys.exit(1)\n" + found, processes=2)
    assert run_job(spec) == 2
    assert "rank 0 failed with exit code 2" in capfd.readouterr().err


def test_killed_rank_is_named_with_its_signal(job, capfd):
    spec = job("if rank == 2: os.kill(os.getpid(), signal.SIGKILL)\n" + SLEEP)
    assert run_job(spec) == 128 + signal.SIGKILL
    assert "rank 2 was killed by SIGKILL" in capfd.readouterr().err


def test_rank_that_does_not_leave_is_killed_after_the_grace(job, capfd):
    hang = (
        "if rank == 0:\n    while not (folder / 'ready_1').exists(): time.sleep(0.01)\n    sys.exit(9)\n" + DEAF + SLEEP
    )
    spec = job(hang, processes=2, grace_seconds=0.5)
    assert run_job(spec) == 9
    assert "killing rank 1: no end after 0.5 s" in capfd.readouterr().err
    assert_nobody_left(spec)


def test_what_a_rank_started_ends_with_it(job):
    child = "import subprocess\np = subprocess.Popen(['sleep', '60'])\n(folder / 'child').write_text(str(p.pid))\n"
    spec = job(child, processes=1)
    assert run_job(spec) == 0
    wait_until(lambda: not alive(int((spec.run_dir / "child").read_text())), seconds=5)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_reaches_every_rank_and_leaving_in_order_is_success(job, signum):
    spec = job(NOTE_SIGNAL + SLEEP)
    launcher = start_launcher(spec, stderr=subprocess.PIPE)
    launcher.send_signal(signum)
    error = launcher.communicate(timeout=20)[1].decode()
    assert launcher.returncode == 0
    assert [(spec.run_dir / f"got_{rank}").read_text() for rank in range(3)] == [str(int(signum))] * 3
    assert f"{signum.name}: passed on to 3 ranks" in error
    assert "failed" not in error


def test_failure_while_leaving_is_still_reported(job):
    spec = job("def save(*_): raise OSError('disk full')\nsignal.signal(signal.SIGTERM, save)\n" + SLEEP, processes=1)
    launcher = start_launcher(spec, stderr=subprocess.PIPE)
    launcher.terminate()
    error = launcher.communicate(timeout=20)[1].decode()
    assert launcher.returncode == 1
    assert "disk full" in error


def test_deaf_ranks_are_killed_after_the_grace_of_a_signal(job):
    spec = job(DEAF + SLEEP, grace_seconds=0.5)
    launcher = start_launcher(spec, stderr=subprocess.PIPE)
    launcher.terminate()
    error = launcher.communicate(timeout=20)[1].decode()
    assert launcher.returncode == 128 + signal.SIGTERM
    assert "killing rank 0, 1, 2" in error
    assert_nobody_left(spec)


def test_second_interrupt_kills_at_once(job):
    spec = job(DEAF + SLEEP, grace_seconds=100.0)
    launcher = start_launcher(spec, stderr=subprocess.PIPE)
    launcher.send_signal(signal.SIGINT)
    time.sleep(0.3)
    launcher.send_signal(signal.SIGINT)
    launcher.communicate(timeout=20)
    assert launcher.returncode == 128 + signal.SIGINT
    assert_nobody_left(spec)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends orphans on Linux only")
def test_killed_launcher_leaves_no_orphans(job):
    spec = job(DEAF + SLEEP)
    launcher = start_launcher(spec)
    launcher.kill()
    launcher.wait(timeout=20)
    assert_nobody_left(spec)


def test_rank_0_sees_a_terminal_when_the_launcher_has_one(job):
    spec = job(READY + "print(sys.stdout.isatty(), os.get_terminal_size().columns)\n", processes=1)
    reader, writer = pty.openpty()
    launcher = start_launcher(spec, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer)
    os.close(writer)
    launcher.wait(timeout=20)
    assert b"True" in os.read(reader, 1024)
    os.close(reader)
    assert (spec.run_dir / "logs/rank_0.log").read_text().startswith("True")


def test_launcher_survives_a_reader_that_left(job):
    spec = job(READY + "for i in range(2000): print('x' * 50)\n", processes=1)
    reader, writer = os.pipe()
    launcher = start_launcher(spec, stdout=writer)
    os.close(writer)
    os.close(reader)
    launcher.wait(timeout=20)
    assert len((spec.run_dir / "logs/rank_0.log").read_text().splitlines()) == 2000


def test_last_words_skip_the_earlier_run(tmp_path: Path):
    log = tmp_path / "rank_0.log"
    log.write_text("Traceback (most recent call last):\nOldError\n")
    start = log.stat().st_size
    with open(log, "a") as file:
        file.write("step 1\r\x1b[32mstep 2\x1b[0m\nnew line\n")
    assert last_words(log, start) == ["step 2", "new line"]


def test_exit_codes_read_as_words():
    assert describe_exit(3) == "failed with exit code 3"
    assert describe_exit(128 + signal.SIGSEGV) == "was killed by SIGSEGV"


def test_wrong_input_that_rank_zero_has_told_the_console_is_told_once(job, capfd):
    assert run_job(job("print('rb: no such file', flush=True)\nsys.exit(2)\n", processes=1)) == 2
    out, err = capfd.readouterr()
    assert out.count("rb: no such file") == 1 and "rb: no such file" not in err


def test_wrong_input_of_a_rank_without_console_is_shown_from_its_log(job, capfd):
    assert run_job(job("if rank:\n    print('rb: no such file', flush=True)\n    sys.exit(2)\n", processes=2)) == 2
    assert "rank 1 failed with exit code 2" in (err := capfd.readouterr().err) and "rb: no such file" in err
