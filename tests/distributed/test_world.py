"""Worlds and commands are forked from a process with everything imported, and each is as if it were alone."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed import forked
from tests.distributed.forked import REPOSITORY, run_forked
from tests.distributed.world import run_world

CASES = "tests.distributed.cases_world"


def has_ended(pid: int, seconds: float = 5.0) -> bool:
    """Whether a process is gone, or a zombie, before the time is over."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


@pytest.fixture(scope="module")
def ranks():
    return run_world(f"{CASES}:about", 3, timeout=60)


def test_every_rank_is_a_process_with_a_session_of_its_own(ranks):
    assert [rank["rank"] for rank in ranks] == ["0", "1", "2"]
    assert all(rank["session"] and rank["threads"] == [1, "1"] for rank in ranks)
    assert {rank["folder"] for rank in ranks} == {str(REPOSITORY)}


def test_ranks_come_from_processes_that_have_imported_everything(ranks):
    servers = [server.process.pid for server in forked._servers.values()]
    assert all(rank["core"] and rank["parent"] in servers for rank in ranks)


def test_no_file_of_the_server_is_open_in_a_rank(ranks):
    for rank in ranks:
        assert [name for name in rank["files"] if not name.startswith(f"/proc/{os.sep}")] == ranks[0]["files"]
        assert not [name for name in rank["files"] if name.startswith(("socket:", "anon_inode:[pidfd]"))]


def test_neighbours_do_not_hash_alike(ranks):
    """An order that hangs on the hashes of strings must not look like an order that all ranks agree on."""
    assert ranks[0]["hash"] != ranks[1]["hash"]


def test_neighbours_draw_differently_and_every_world_draws_the_same(ranks):
    """Random numbers on which ranks have not agreed must not be equal by chance, and a failure must come again."""
    assert len({tuple(rank["drawn"]) for rank in ranks}) == len(ranks)
    assert [rank["drawn"] for rank in run_world(f"{CASES}:about", 2, timeout=60)] == [
        rank["drawn"] for rank in ranks[:2]
    ]


def test_servers_have_one_thread():
    run_world(f"{CASES}:about", 2, timeout=60)
    for server in forked._servers.values():
        assert len(os.listdir(f"/proc/{server.process.pid}/task")) == 1


def test_what_a_world_changes_reaches_no_other():
    run_world(f"{CASES}:change_the_package", 2, timeout=60)
    assert [rank["mark"] for rank in run_world(f"{CASES}:about", 2, timeout=60)] == [None, None]


def test_fresh_ranks_are_new_interpreters():
    (rank,) = run_world(f"{CASES}:about", 1, timeout=120, fresh=True)
    assert rank["parent"] == os.getpid() and not rank["core"]


def test_a_failure_shows_the_output_of_every_rank():
    start = time.monotonic()
    with pytest.raises(AssertionError, match="(?s)rank 0 was here.*rank 1 was here.*rank one does not like it"):
        run_world(f"{CASES}:fail_on_rank_one", 2, timeout=60)
    assert time.monotonic() - start < 30  # the others have 3 s


def test_at_the_time_limit_stacks_are_shown_and_whole_groups_end(tmp_path):
    with pytest.raises(AssertionError, match="(?s)Timeout.*in hang_with_a_child.*rank 1.*in hang_with_a_child"):
        run_world(f"{CASES}:hang_with_a_child", 2, timeout=7, folder=str(tmp_path))
    assert all(has_ended(int(path.read_text())) for path in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 2


OWN_SERVER = """
import os, signal
from pathlib import Path
from tests.distributed import forked
words = ["-n", "1", "import time; time.sleep(60)"]
with open(os.devnull, "r+b") as nothing:
    files = (nothing.fileno(),) * 3
    process = forked.start_forked("timeit", words, Path("/"), forked.environment_of_tests(), files)
print(forked._servers["", 0].process.pid, process.pid, flush=True)
HOW
"""


@pytest.mark.parametrize("how", ["os.kill(os.getpid(), signal.SIGKILL)", "pass"], ids=["killed", "at its end"])
def test_servers_and_ranks_end_with_the_process_that_started_them(how):
    program = OWN_SERVER.replace("HOW", how)
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 2 and all(has_ended(pid) for pid in pids), done.stderr


def plain(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The same command in a new interpreter."""
    command = [sys.executable, "-m", *words]
    environment = forked.environment_of_tests()
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "words",
    [
        ["megatron_rb.cli", "nonsense"],
        ["megatron_rb.cli", "--help"],
        ["megatron_rb.cli", "convert", "import", "--hf", "absent", "--out", "out"],
        ["timeit", "-n", "1", "raise SystemExit('a message')"],
        ["here", "one", "two words"],
    ],
    ids=["wrong command", "help", "wrong input", "exit with a message", "module of the folder"],
)
def test_a_forked_command_says_and_returns_what_a_new_interpreter_does(words, tmp_path):
    lines = ["import os, sys", "print(sys.argv, sys.path[0], os.getcwd(), __name__, __file__)", "sys.exit(7)"]
    (tmp_path / "here.py").write_text("\n".join(lines))
    done, wanted = run_forked(*words, folder=tmp_path, timeout=60), plain(*words, folder=tmp_path)
    assert (done.returncode, done.stdout) == (wanted.returncode, wanted.stdout)
    assert done.stderr.splitlines()[-1:] == wanted.stderr.splitlines()[-1:]


def test_a_forked_command_that_takes_too_long_is_killed(tmp_path):
    with pytest.raises(subprocess.TimeoutExpired):
        run_forked("timeit", "-n", "1", "import time; time.sleep(60)", folder=tmp_path, timeout=1.0)


def test_output_and_errors_can_be_merged(tmp_path):
    (tmp_path / "speak.py").write_text("import sys\nprint(1, flush=True)\nprint(2, file=sys.stderr)\nprint(3)\n")
    done = run_forked("speak", folder=tmp_path, timeout=60, merged=True)
    assert (done.stdout, done.stderr) == ("1\n2\n3\n", None)


# Each of the following ends a server, and the next one starts another.


def test_a_variable_that_imports_may_read_is_there_at_the_imports(monkeypatch):
    before = forked.server_for(forked.environment_of_tests(), 0)
    monkeypatch.setenv("A_VARIABLE_OF_THE_TEST", "on")
    (rank,) = run_world(f"{CASES}:about", 1, timeout=120)
    server = forked._servers["", 0]
    assert rank["variable"] == "on" == server.environment["A_VARIABLE_OF_THE_TEST"]
    assert rank["parent"] == server.process.pid != before.process.pid
    assert has_ended(before.process.pid)


def test_a_command_whose_server_is_killed_does_not_look_like_one_that_failed(tmp_path, monkeypatch):
    monkeypatch.setenv("A_VARIABLE_OF_THE_TEST", "on")
    with pytest.raises(AssertionError, match="the fork server has died while it ran"):
        run_forked("timeit", "-n", "1", "import os; os.kill(os.getppid(), 9)", folder=tmp_path, timeout=60)


def test_a_server_that_is_killed_takes_its_ranks_with_it_and_is_followed_by_another():
    before = run_world(f"{CASES}:about", 2, timeout=60)
    with pytest.raises(AssertionError, match=r"rank 0 \(killed, its fork server has died\)(?s:.*)rank 1 \(exit -9\)"):
        run_world(f"{CASES}:kill_the_server", 2, timeout=60)
    after = run_world(f"{CASES}:about", 2, timeout=120)
    assert [one["parent"] == other["parent"] for one, other in zip(before, after, strict=True)] == [False, True]
