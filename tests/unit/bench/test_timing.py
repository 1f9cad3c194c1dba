"""Timing in turn: who is called when, and how ratios are taken."""

import time

from megatron_rb.bench.timing import Times, median_ratio, time_in_turn


def test_every_round_calls_every_side_and_the_order_turns():
    calls = []
    times = time_in_turn({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=3)
    assert "".join(calls) == "abcbcacab"
    assert [len(side.wall) for side in times.values()] == [3, 3, 3]


def test_sleep_counts_as_wall_time_and_not_as_cpu_time():
    side = time_in_turn({"sleep": lambda: time.sleep(0.05)}, rounds=1)["sleep"]
    assert side.median >= 0.05 > side.median_cpu


def test_ratios_are_taken_round_by_round():
    # The second round met a busy machine; its ratio is as good as the others.
    assert median_ratio([1.0, 9.0, 1.2], [2.0, 10.0, 2.0]) == 0.6
    assert Times([3.0, 1.0, 2.0], [1.0, 1.0, 4.0]).median == 2.0
