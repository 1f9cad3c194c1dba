"""The launcher's arithmetic: time limits, verdicts, topology, ratios, simulated faults."""

import re
from pathlib import Path

import pytest

from megatron_rb.launch.failure import FailureKind, kind_of_exit
from megatron_rb.launch.hostfile import read_hosts
from megatron_rb.launch.job import Host, JobSpec
from megatron_rb.launch.limits import Beat, Limits, RankProgress
from megatron_rb.launch.record import AttemptNote, effective_time_ratio, running_seconds
from megatron_rb.launch.simulate import FaultFigures, simulate_ettr
from megatron_rb.launch.topology import choose_nodes, leaf_of_nodes, rank_table, table_text
from megatron_rb.launch.verdict import judge

TOPOLOGY = """SwitchName=leaf1 Level=0 LinkSpeed=1 Nodes=node[1-2]
SwitchName=leaf2 Level=0 LinkSpeed=1 Nodes=node[3-4]
SwitchName=spine Level=1 LinkSpeed=1 Nodes=node[1-4] Switches=leaf[1-2]"""


def failed(number: int, kind: str = "rank", last_step: int = 0, resumed_from: int = 0, **more) -> AttemptNote:
    return AttemptNote(
        number,
        f"a{number}",
        ["n1", "n2"],
        0.0,
        resumed_from,
        ended=1.0,
        outcome="failed",
        last_step=last_step,
        kind=kind,
        cause="it broke",
        phase=more.pop("phase", "step"),
        **more,
    )


def test_unknown_phase_has_the_configured_limit():
    assert Limits(600.0).of("step") == 600.0
    assert Limits(600.0, {"step": 1.0}, least=60.0).of("step") == 60.0


def test_limit_of_a_step_follows_the_slowest():
    limits = Limits(600.0)
    progress = RankProgress(limits, now=0.0)
    for step, time in ((1, 10.0), (2, 11.0), (3, 14.0), (4, 15.0)):
        progress.see(Beat(1, "step", step, time), now=time)
    assert limits.slowest["step"] == 3.0
    assert limits.of("step") <= 2 * 3.0 + 5
    assert not progress.hangs(now=24.9)
    assert progress.hangs(now=25.1)


def test_time_before_a_phase_changes_is_that_of_the_phase():
    limits = Limits(600.0)
    progress = RankProgress(limits, now=0.0)
    for phase, time in (("init", 0.0), ("step", 20.0), ("checkpoint", 21.0), ("step", 26.0)):
        progress.see(Beat(1, phase, 1, time), now=time)
    assert limits.slowest == {"init": 20.0, "checkpoint": 5.0}


@pytest.mark.parametrize(
    ("code", "kind"),
    [(1, "rank"), (137, "rank"), (2, "configuration"), (78, "configuration"), (65, "numbers"), (75, "node")],
)
def test_exit_codes_have_classes(code: int, kind: str):
    assert kind_of_exit(code) is FailureKind(kind)


def test_numbers_that_are_not_finite_are_never_tried_again():
    verdict = judge([failed(1, "numbers")], max_retries=9)
    assert not verdict.retry and "not finite" in verdict.reason


def test_wrong_configuration_is_never_tried_again():
    verdict = judge([failed(1, "configuration")], max_retries=9)
    assert not verdict.retry and "settings are wrong" in verdict.reason


def test_same_step_twice_ends_the_run():
    verdict = judge([failed(1, last_step=6), failed(2, last_step=6)], max_retries=9)
    assert not verdict.retry and verdict.reason.startswith("step 7 failed twice")


def test_lost_machines_at_the_same_step_do_not_end_the_run():
    assert judge([failed(1, "node", 6, node="n1"), failed(2, "node", 6, node="n2")], max_retries=9).retry


def test_retries_are_counted_without_progress_only():
    fruitless = [failed(1, last_step=1), failed(2, last_step=2), failed(3, last_step=3)]
    assert not judge(fruitless, max_retries=2).retry
    fruitful = [failed(n, last_step=n * 10 + n, resumed_from=n * 10) for n in range(30)]
    assert judge(fruitful, max_retries=1).retry


def test_lost_machine_and_repeated_failures_on_one_are_excluded():
    assert judge([failed(1, "node", node="n2")], 3).exclude == "n2"
    on_one = [failed(number, last_step=number, node="n2") for number in (1, 2, 3)]
    assert judge(on_one, 3).exclude == "n2"
    assert judge([failed(1, last_step=1, node="n1"), *on_one[1:]], 3).exclude == ""


def test_nodes_of_one_leaf_stay_together():
    leaves = leaf_of_nodes(TOPOLOGY, expand)
    assert leaves == {"node1": "leaf1", "node2": "leaf1", "node3": "leaf2", "node4": "leaf2"}
    assert choose_nodes(["node1", "node3", "node4"], 2, leaves) == ("node3", "node4")


def expand(text: str) -> list[str]:
    first, last = re.fullmatch(r"node\[(\d)-(\d)\]", text).groups()
    return [f"node{number}" for number in range(int(first), int(last) + 1)]


def test_tensor_parallel_ranks_share_a_machine():
    places = rank_table(JobSpec("m", (), 4, Path(), nodes=4, tp_size=2, pp_size=2), ["a", "b", "c", "d"])
    groups: dict[tuple[int, int], set[str]] = {}
    for place in places:
        groups.setdefault((place.dp_rank, place.pp_rank), set()).add(place.node)
    assert all(len(nodes) == 1 for nodes in groups.values())
    assert [place.pp_rank for place in places] == [0] * 8 + [1] * 8


def test_the_table_counts_context_parallel_ranks():
    text = table_text(rank_table(JobSpec("m", (), 8, Path(), tp_size=2, cp_size=2), ["a"]))
    rows = [line.split() for line in text.splitlines()]
    assert rows[0] == ["rank", "node", "local_rank", "tp", "cp", "dp", "pp"]
    assert [(row[3], row[4], row[5]) for row in rows[1:4]] == [("0", "0", "0"), ("1", "0", "0"), ("0", "1", "0")]
    assert [row[5] for row in rows[1:]] == ["0"] * 4 + ["1"] * 4


def test_host_file_of_flagscale_is_read(tmp_path):
    (tmp_path / "hosts").write_text("# machines\n10.0.0.1 slots=8 type=A800\n\nmtt-1 slots=8 type=MTT # new\nc\n")
    assert read_hosts(tmp_path / "hosts") == (Host("10.0.0.1", 8, "A800"), Host("mtt-1", 8, "MTT"), Host("c"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a slot=8", r"line 1: 'slot=8' is not known"),
        ("a slots=x", r"slots must be a whole number, got 'x'"),
        ("a\na", r"names a more than once"),
        ("# none", r"names no host"),
    ],
)
def test_bad_host_file_is_one_sentence(tmp_path, text: str, words: str):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_hosts(tmp_path / "hosts")


def test_time_stopped_on_purpose_is_not_lost():
    notes = [
        AttemptNote(1, "a", [], started=0.0, resumed_from=0, ended=10.0, outcome="stopped"),
        AttemptNote(2, "b", [], started=1000.0, resumed_from=5, ended=1010.0, outcome="failed"),
        AttemptNote(3, "c", [], started=1015.0, resumed_from=5),
    ]
    assert running_seconds(notes, until=1020.0) == 30.0
    assert effective_time_ratio([12.0, 3.0], 30.0) == 0.5


def test_simulated_ratio_agrees_with_the_formula_and_falls_with_slower_notice():
    figures = FaultFigures(7.9 * 3600, 60.0, 180.0, 600.0, 0.0)
    expected = 1 - (60 + 180 + 300) / (7.9 * 3600)
    assert simulate_ettr(figures, days=3000) == pytest.approx(expected, abs=0.004)
    slow = FaultFigures(7.9 * 3600, 600.0, 720.0, 3600.0, 0.0)
    assert simulate_ettr(slow, days=3000) < 0.92
