"""Ranks played against each other: every planted fault is named with the ranks, the call and the lines."""

from dataclasses import replace

import pytest

from megatron_rb.rehearsal.match import Transcript, defects
from megatron_rb.rehearsal.messages import Group, Message

ALL = Group("0", (0, 1), "cpu:gloo,cuda:nccl", "start.py:1")
PIPELINE = Group("1", (0, 1), "nccl", "start.py:2")


def reduce(values=8, **fields):
    plain = {"dtype": "float32", "device": "cuda", "sent": ((values,),), "received": (), "site": "grads.py:7 reduce"}
    return Message("allreduce_", "0", **plain | fields)


def message(kind, peer, values=4, **fields):
    plain = {"dtype": "bfloat16", "device": "cuda", "sent": ((values, 1, 1),), "received": (), "batch": 1}
    return Message(kind, "1", **plain | {"peer": peer, "site": f"p2p.py:{5 if kind == 'send' else 9} {kind}"} | fields)


def pair() -> dict[int, list[Message]]:
    """Rank 0 sends forward and gets a gradient back; both reduce at the end."""
    return {
        0: [message("send", 1), message("recv_", 1, batch=2), reduce(), reduce(16)],
        1: [message("recv_", 0), message("send", 0, batch=2), reduce(), reduce(16)],
    }


def found(said: dict[int, list[Message]], groups=(ALL, PIPELINE)) -> dict[str, str]:
    known = {group.name: group for group in groups}
    return {each.kind: each.text for each in defects([Transcript(rank, known, log) for rank, log in said.items()])}


def test_ranks_that_agree_have_no_defect():
    assert found(pair()) == {}


def test_a_collective_that_a_rank_skips_is_named():
    said = pair()
    del said[1][2]
    text = found(said)["collective"]
    assert "call 1 on group 0 of ranks 0, 1: rank 0 calls allreduce of 8 float32 on cuda at grads.py:7 reduce" in text
    assert "rank 1 calls allreduce of 16 float32" in text and "deadlock" in found(said)


def test_a_collective_of_another_size_is_named_though_nobody_hangs():
    said = pair()
    said[1][3] = reduce(18)
    assert "rank 0 calls allreduce of 16 float32" in found(said)["collective"]
    assert "rank 1 calls allreduce of 18 float32" in found(said)["collective"]


@pytest.mark.parametrize("change", [{"dtype": "float32"}, {"sent": ((5, 1, 1),)}])
def test_a_message_that_is_expected_otherwise_is_named(change):
    said = pair()
    said[1][0] = replace(said[1][0], **change)
    text = found(said)["message"]
    assert "message 1 from rank 0 to rank 1 on group 1" in text and "p2p.py:5 send" in text and "p2p.py:9 recv_" in text


def test_a_lost_message_leaves_its_receiver_waiting_for_ever():
    said = pair()
    del said[0][0]
    assert "rank 0 makes no such call, rank 1 calls recv from rank 0" in found(said)["message"]
    assert "rank 1 in calls recv" in found(said)["deadlock"].replace("rank 1 in calls", "rank 1 in calls")


def test_calls_in_another_order_are_a_deadlock():
    said = pair()
    said[0].insert(0, said[0].pop(2))
    assert found(said)["deadlock"].startswith("2 ranks wait for ever: rank 0 in calls allreduce")


def test_messages_that_are_started_alone_must_be_mirrored():
    """Each pair of ranks of a group has one queue for both directions."""
    alone = {"batch": 0, "blocks": False}
    said = {
        0: [message("send", 1, **alone), message("recv_", 1, **alone)],
        1: [message("send", 0, **alone), message("recv_", 0, **alone)],
    }
    assert "between ranks 0 and 1 on group 1, message 1" in found(said)["order"]
    assert found({0: said[0], 1: said[1][::-1]}) == {}


def test_a_group_that_ranks_know_differently_is_named():
    said, known = pair(), {group.name: group for group in (ALL, PIPELINE)}
    other = known | {"1": replace(PIPELINE, backend="gloo", site="start.py:9")}
    text = defects([Transcript(0, known, said[0]), Transcript(1, other, said[1])])[0].text
    assert "over nccl on rank 0 (start.py:2) and ranks 0, 1 over gloo on rank 1 (start.py:9)" in text


def test_ranks_that_are_not_rehearsed_are_taken_to_fit():
    wide = replace(ALL, ranks=tuple(range(1024)))
    assert found({0: [reduce()], 1: [reduce()]}, (wide, PIPELINE)) == {}
    assert found({0: [message("send", 512)]}, (replace(ALL, ranks=(0, 512)), PIPELINE)) == {}
