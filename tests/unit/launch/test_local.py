"""Ports that runs meet at."""

import socket

import pytest

from megatron_rb.launch import local
from megatron_rb.launch.local import FIRST_PORT, free_port


@pytest.fixture
def outgoing_from(tmp_path, monkeypatch):
    """Sets the first port that the system gives to outgoing connections."""

    def set_first(port: int) -> None:
        (tmp_path / "range").write_text(f"{port}\t60999\n")
        monkeypatch.setattr(local, "PORT_RANGE", tmp_path / "range")

    return set_first


def test_a_free_port_is_none_of_outgoing_connections(outgoing_from):
    outgoing_from(32768)
    assert all(FIRST_PORT <= free_port("127.0.0.1") < 32768 for _ in range(20))


def test_a_port_that_is_taken_is_not_drawn(outgoing_from):
    outgoing_from(FIRST_PORT + 1)
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", FIRST_PORT))
        assert free_port("127.0.0.1") > FIRST_PORT


def test_a_system_that_tells_no_range_has_free_ports_too(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "PORT_RANGE", tmp_path / "absent")
    assert free_port("127.0.0.1") >= FIRST_PORT


def test_the_address_of_another_machine_is_refused():
    with pytest.raises(ValueError, match=r"cluster.master_addr 203.0.113.7 is not an address of this machine"):
        free_port("203.0.113.7")
