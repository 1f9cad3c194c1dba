"""Objects along trees: brute force over all sizes of a group, with threads for ranks."""

import queue
import threading
from collections import defaultdict

import pytest

from megatron_rb.platform import planning_trees
from megatron_rb.platform.planning_trees import gather_to_first, scatter_from_first


class Ranks:
    """A group of threads; counts who has exchanged something with whom."""

    def __init__(self, size: int) -> None:
        self.size, self.own = size, threading.local()
        self.boxes: dict[tuple[int, int], queue.Queue] = defaultdict(queue.Queue)
        self.peers: dict[int, set[int]] = defaultdict(set)

    def get_rank(self, group=None) -> int:
        return self.own.rank

    def get_world_size(self, group=None) -> int:
        return self.size

    def send_object_list(self, values, dst, group, device) -> None:
        self.peers[self.own.rank].add(dst)
        self.boxes[self.own.rank, dst].put(values[0])

    def recv_object_list(self, values, src, group, device) -> None:
        self.peers[self.own.rank].add(src)
        values[0] = self.boxes[src, self.own.rank].get(timeout=20)

    def run(self, action):
        results = [None] * self.size

        def one(rank: int) -> None:
            self.own.rank = rank
            results[rank] = action(rank)

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return results


@pytest.fixture(params=[*range(1, 18), 64, 100])
def ranks(request, monkeypatch):
    group = Ranks(request.param)
    monkeypatch.setattr(planning_trees, "dist", group)
    return group


def test_the_first_rank_has_the_values_of_all_in_order_and_the_others_none(ranks):
    found = ranks.run(lambda rank: gather_to_first(f"plan {rank}"))
    assert found == [[f"plan {rank}" for rank in range(ranks.size)], *[None] * (ranks.size - 1)]


def test_every_rank_gets_its_own_of_what_the_first_has(ranks):
    values = [f"plan {rank}" for rank in range(ranks.size)]
    assert ranks.run(lambda rank: scatter_from_first(None if rank else values)) == values


def test_no_rank_has_more_peers_than_the_tree_is_deep(ranks):
    values = list(range(ranks.size))
    ranks.run(lambda rank: (gather_to_first(rank), scatter_from_first(None if rank else values)))
    deep = (ranks.size - 1).bit_length()
    assert max((len(peers) for peers in ranks.peers.values()), default=0) <= deep
