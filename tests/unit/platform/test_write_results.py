"""What writers report, against a queue."""

import multiprocessing
import os
import queue

import pytest

from megatron_rb.platform.write_results import WriteResults, write_results

MORE_THAN_A_PIPE_HOLDS = 1 << 20


def test_values_come_in_their_order_and_then_no_more():
    results = WriteResults()
    results.put({"a": [1, 2]})
    results.put(ValueError("full"))
    assert results.get_nowait() == {"a": [1, 2]}
    assert str(results.get_nowait()) == "full"
    with pytest.raises(queue.Empty):
        results.get_nowait()


def test_nothing_is_kept_once_all_is_read():
    results = WriteResults()
    for number in range(3):
        results.put(number)
        assert results.get_nowait() == number
    assert os.fstat(results._file.fileno()).st_size == 0
    with pytest.raises(queue.Empty):
        results.get_nowait()


@pytest.mark.timeout(60)
def test_a_fork_reports_more_than_a_pipe_holds_before_anyone_reads():
    results = WriteResults()
    for value in ("x" * MORE_THAN_A_PIPE_HOLDS, "second"):
        writer = multiprocessing.get_context("fork").Process(target=results.put, args=(value,))
        writer.start()
        writer.join()
        assert writer.exitcode == 0
        assert results.get_nowait() == value


def test_a_file_without_memfd_does_the_same(monkeypatch):
    monkeypatch.delattr(os, "memfd_create", raising=False)
    results = WriteResults()
    results.put("value")
    assert results.get_nowait() == "value"


def test_a_process_has_one_whatever_mode_megatron_core_asks_for():
    assert write_results() is write_results("fork")
