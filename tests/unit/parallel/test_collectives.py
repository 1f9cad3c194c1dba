"""Small exchanges between ranks, as one rank sees them, and rank by rank with the exchange itself replaced."""

import pytest
import torch
import torch.distributed as dist

from megatron_rb.parallel import collectives
from megatron_rb.parallel.collectives import gather_from_all, gather_over, on_all, rank_zero_first, wait_for_all


@pytest.mark.usefixtures("lone_mesh")
def test_values_of_all_ranks_are_those_of_the_one_there_is():
    assert gather_from_all({"a": [1]}) == [{"a": [1]}]
    wait_for_all()


def test_gathered_tensors_are_copies_even_of_what_is_not_contiguous(lone_mesh):
    values = torch.arange(6).reshape(2, 3).T
    [found] = gather_over(values, lone_mesh.tp_group)
    assert torch.equal(found, values) and found.data_ptr() != values.data_ptr()


@pytest.mark.usefixtures("lone_mesh")
def test_the_value_of_the_action_comes_back_and_it_runs_once():
    calls = []
    assert rank_zero_first(lambda: calls.append("made") or 7) == 7
    assert calls == ["made"]


@pytest.mark.usefixtures("lone_mesh")
def test_an_action_of_all_gives_its_value_or_its_error():
    assert on_all(lambda: 7) == 7
    with pytest.raises(KeyError, match="absent"):
        on_all(lambda: {}["absent"])


class Order:
    """Stands for the world: what one rank does, and what rank 0 told it."""

    def __init__(self, monkeypatch, rank: int, told: Exception | None = None) -> None:
        self.calls: list[str] = []
        monkeypatch.setattr(collectives.dist, "get_rank", lambda: rank)

        def broadcast(values, src, device):
            self.calls.append("heard" if rank else "told")
            if rank:
                values[0] = told

        monkeypatch.setattr(collectives.dist, "broadcast_object_list", broadcast)

    def action(self) -> str:
        self.calls.append("acted")
        return "value"


def test_rank_0_acts_before_it_tells_and_the_others_after_they_heard(monkeypatch):
    found = []
    for rank in (0, 1):
        order = Order(monkeypatch, rank)
        found.append((rank_zero_first(order.action), order.calls))
    assert found == [("value", ["acted", "told"]), ("value", ["heard", "acted"])]


@pytest.mark.parametrize("error", [ValueError("bad folder"), OSError("disk full")])
def test_an_error_of_rank_0_is_raised_everywhere_and_stops_the_others(monkeypatch, error):
    def fail():
        raise error

    order = Order(monkeypatch, 0)
    with pytest.raises(type(error), match=str(error)):
        rank_zero_first(fail)
    assert order.calls == ["told"]
    order = Order(monkeypatch, 1, told=error)
    with pytest.raises(type(error), match=str(error)):
        rank_zero_first(order.action)
    assert order.calls == ["heard"]


@pytest.mark.usefixtures("lone_mesh")
def test_an_error_of_ours_is_not_wrapped():
    with pytest.raises(ZeroDivisionError):
        rank_zero_first(lambda: 1 / 0)
    assert dist.is_initialized()
