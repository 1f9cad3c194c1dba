"""The bad machine is named with its figure and the others' median."""

from typing import Any

from megatron_rb.launch.doctor import file_findings, files_line, findings, table
from megatron_rb.launch.open_files import files_of_rank, files_of_store


def report(host: str, **more: Any) -> dict[str, Any]:
    usual = {
        "host": host,
        "platform": "cpu",
        "devices": 1,
        "cores": 8,
        "memory_free_gib": 1.0,
        "memory_gib": 2.0,
        "disk_free_gib": 3.0,
        "matmul_tflops": 1.0,
        "within": 2.0,
        "pairs": {"0": 1.0},
        "port": "not asked",
        "libraries": {"torch": "2"},
        "faults": [],
        "clock": 100.0,
        "driver": "",
        "open_files": 1 << 20,
        "lazy_gloo": True,
    }
    return usual | more


def machines(**more: Any) -> list[dict[str, Any]]:
    return [report("node1"), report("node2", **more), report("node3"), report("node4")]


def test_equal_machines_are_fine():
    assert findings(machines()) == []
    assert "node2: cpu x 1" in table(machines())


def test_slow_device_and_slow_links_are_named():
    assert findings(machines(matmul_tflops=0.5)) == ["node2: 0.5 TFLOP/s in a matrix product, the median is 1"]
    assert findings(machines(within=0.9)) == ["node2: 0.9 GB/s inside the machine, the median is 2"]
    assert findings(machines(pairs={"0": 0.1, "2": 0.2})) == ["node2: 0.2 GB/s to other machines, the median is 1"]


def test_other_libraries_a_wrong_clock_and_a_port_in_use_are_named():
    assert "node2: libraries" in findings(machines(libraries={"torch": "1"}))[0]
    assert findings(machines(clock=160.0)) == ["node2: its clock is +60 s off"]
    assert findings(machines(port="7: Address already in use")) == ["node2: port 7: Address already in use"]


def test_a_library_that_cannot_be_used_is_named_with_its_machine():
    assert findings(machines(faults=["megatron-core is not installed"])) == ["node2: megatron-core is not installed"]


def test_a_machine_that_allows_too_few_open_files_is_named_with_both_figures():
    needed = files_of_store(1024)
    (line,) = file_findings(machines(open_files=1024), needed)
    assert line.startswith(
        f"node2: at most 1024 open files (hard limit), rank 0 or its store needs up to {needed}; raise `nofile`"
    )
    assert file_findings(machines(open_files=4096), needed) == []


def test_the_files_of_a_rank_are_told_in_one_sentence():
    line = files_line(machines(open_files=4096), 1024, 1500)
    assert (
        line == "open files: a process of 1024 ranks needs up to 1500 (gloo connects lazily), a process may have 4096"
    )


def test_gloo_that_connects_at_once_needs_thousands_of_files():
    assert [files_of_rank(1024, 4, 4, 1, lazy) for lazy in (False, True)] == [256 + 2442, 256 + 126]


def test_devices_with_a_backend_of_their_own_leave_few_files_to_gloo():
    on_devices, on_host = (files_of_rank(8192, 4, 4, 1, lazy=False, devices=devices) for devices in (True, False))
    assert on_devices == 256 + 1 + (4 * 2 + 8191 + 15) < on_host
