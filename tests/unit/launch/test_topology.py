"""Which machines are taken, and where ranks are on them."""

import re
from pathlib import Path

from megatron_rb.launch.job import JobSpec
from megatron_rb.launch.topology import choose_nodes, leaf_of_nodes, rank_table, table_text

TOPOLOGY = """SwitchName=leaf1 Level=0 LinkSpeed=1 Nodes=node[1-2]
SwitchName=leaf2 Level=0 LinkSpeed=1 Nodes=node[3-4]
SwitchName=spine Level=1 LinkSpeed=1 Nodes=node[1-4] Switches=leaf[1-2]"""


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
