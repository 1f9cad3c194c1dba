"""The store of a world is kept by a process beside rank 0."""

import importlib
import inspect
import os
import socket
import time
from datetime import timedelta
from pathlib import Path

import pytest

from megatron_rb.parallel.store import agent_keeps_store, join_store

TIMEOUT = timedelta(seconds=20)


@pytest.fixture
def port(monkeypatch):
    """A free port that the environment names."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number = probe.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(number))
    return number


def children() -> set[str]:
    return set(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())


def test_rank_0_and_the_others_meet_in_it(port):
    first, second = join_store(0, TIMEOUT), join_store(1, TIMEOUT)
    first.set("told", "by rank 0")
    assert second.get("told") == b"by rank 0"


def test_rank_0_holds_one_socket_however_many_ranks_there_are(port):
    before = len(os.listdir("/proc/self/fd"))
    store = join_store(0, TIMEOUT)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del store


def test_another_rank_starts_no_process(port):
    others = children()
    first = join_store(0, TIMEOUT)
    kept_by = children() - others
    second = join_store(1, TIMEOUT)
    assert len(kept_by) == 1 and children() - others == kept_by
    del first, second


def test_its_process_ends_when_rank_0_does(port):
    ranks = os.fork()
    if ranks == 0:
        join_store(0, TIMEOUT)
        os._exit(0)
    os.waitpid(ranks, 0)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return
        time.sleep(0.05)
    raise AssertionError("the store is still there")


def test_a_port_that_is_taken_is_one_sentence_at_once(port):
    with socket.socket() as other:
        other.bind(("", port))
        other.listen()
        start = time.monotonic()
        with pytest.raises(RuntimeError, match=rf"cannot be kept at port {port} \(MASTER_PORT\): .*in use"):
            join_store(0, TIMEOUT)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(("value", "kept"), [("True", True), ("False", False), ("", False)])
def test_under_torchrun_the_store_is_its_agents(value, kept, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", value)
    assert agent_keeps_store() == kept


def test_torch_reads_the_variable_of_torchrun_the_same_way():
    source = inspect.getsource(importlib.import_module("torch.distributed.rendezvous"))
    assert 'os.environ.get("TORCHELASTIC_USE_AGENT_STORE", None) == str(True)' in source
