"""Which machines are measured against which, and the line the doctor of one machine prints."""

import json

import pytest
import torch.distributed as dist

from megatron_rb.parallel import doctor
from megatron_rb.platform.cpu import CpuPlatform


@pytest.mark.parametrize("nodes", [2, 3, 4, 5, 8, 9])
def test_in_a_round_no_node_is_in_two_pairs(nodes):
    for pairs in doctor._rounds(nodes):
        busy = [node for pair in pairs for node in pair]
        assert len(busy) == len(set(busy))


@pytest.mark.parametrize("nodes", [3, 4, 5, 8, 9])
def test_every_node_is_measured_against_two_others_once_each(nodes):
    pairs = [frozenset(pair) for pairs in doctor._rounds(nodes) for pair in pairs]
    assert len(pairs) == len(set(pairs)) == nodes
    assert all(sum(node in pair for pair in pairs) == 2 for node in range(nodes))


@pytest.mark.parametrize(("nodes", "pairs"), [(1, []), (2, [(0, 1)])])
def test_two_nodes_are_one_pair_and_one_is_none(nodes, pairs):
    assert [pair for pairs in doctor._rounds(nodes) for pair in pairs] == pairs


def test_the_bandwidth_is_that_of_the_best_try(monkeypatch):
    moments = iter([0.0, 4.0, 10.0, 11.0, 20.0, 22.0])
    monkeypatch.setattr(doctor.time, "perf_counter", lambda: next(moments))
    monkeypatch.setattr(dist, "all_reduce", lambda values, group: None)
    assert doctor._bandwidth(CpuPlatform(), None) == round(doctor.BYTES["cpu"] / 1.0 / 1e9, 3)


@pytest.fixture
def alone(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(doctor, "machine_report", lambda platform, folder, port: {"folder": folder, "port": port})


@pytest.mark.usefixtures("alone")
def test_a_lone_process_prints_one_line_about_its_machine_and_leaves_no_world(capsys, tmp_path):
    assert doctor.main(["cpu", str(tmp_path), "0"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith(doctor.REPORT)]
    assert json.loads(line.removeprefix(doctor.REPORT)) == [
        {"folder": str(tmp_path), "port": 0, "within": None, "pairs": {}}
    ]
    assert not dist.is_initialized()
