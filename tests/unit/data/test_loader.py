"""Steps of samples: order, shares of the ranks, resuming, broken media."""

import threading

import numpy as np
import pytest

from megatron_rb.data.ledger import Ledger, read_ledger
from megatron_rb.data.loader import RankShare, ReadAhead, SampleOrder, StepLoader, StepSize
from megatron_rb.data.packing import Budget
from megatron_rb.data.problems import BadSample
from megatron_rb.data.sample import EncodedSample, VisionGrid


class Numbers:
    """A data set without files: sample n is named n."""

    def __init__(self, count: int, broken: frozenset[int] = frozenset()) -> None:
        rng = np.random.default_rng(0)
        self.sizes = np.stack([rng.integers(1, 60, count), 4 * rng.integers(0, 20, count)], axis=1)
        self.broken = broken
        self.fetched = 0

    def __len__(self) -> int:
        return len(self.sizes)

    def get(self, number: int, *, with_pixels: bool) -> EncodedSample:
        self.fetched += 1
        if with_pixels and number in self.broken:
            raise BadSample("unreadable media", f"image {number} does not decode")
        sample = self.blank(number)
        sample.pixels = [np.ones((sample.num_patches, 3), np.float32)] if with_pixels else None
        return sample

    def blank(self, number: int) -> EncodedSample:
        tokens, patches = self.sizes[number].tolist()
        ids = np.full(tokens, number, np.int32)
        grids = (VisionGrid(1, 2, patches // 2, "image"),) if patches else ()
        return EncodedSample(str(number), ids, ids, grids, [np.zeros((patches, 3), np.float32)])

    def source(self, number: int) -> tuple[str, int]:
        return "numbers.jsonl", number + 1


@pytest.fixture
def open_loader(tmp_path):
    opened = []

    def build(
        dataset, *, batch=8, micro_batches=0, multiple=1, shuffle=True, prefetch_steps=2, decode_threads=2, **share
    ) -> StepLoader:
        loader = StepLoader(
            dataset,
            StepSize(Budget(128, 128), batch, micro_batches, multiple),
            RankShare(**share),
            SampleOrder(11, shuffle),
            Ledger(tmp_path / "ledger.jsonl"),
            ReadAhead(prefetch_steps, decode_threads),
        )
        opened.append(loader)
        return loader

    yield build
    for loader in opened:
        loader.close()


def _names(step) -> list[str]:
    return [sample.sample_id for members in step.micro_batches for sample in members]


def _union(loaders) -> list[str]:
    return sorted(name for loader in loaders for name in _names(loader.next_step()))


def test_an_epoch_holds_every_sample_once(open_loader):
    loader = open_loader(Numbers(24))
    names = [name for _ in range(3) for name in _names(loader.next_step())]
    assert sorted(names, key=int) == [str(number) for number in range(24)]
    assert loader.state_dict() == {"seed": 11, "epoch": 1, "position": 0}


def test_file_order_without_shuffle(open_loader):
    loader = open_loader(Numbers(24), shuffle=False)
    assert sorted(map(int, _names(loader.next_step()))) == list(range(8))


def test_micro_batches_keep_both_budgets(open_loader):
    loader = open_loader(Numbers(50), batch=40)
    for members in loader.next_step().micro_batches:
        assert sum(len(sample.input_ids) for sample in members) <= 128
        assert sum(sample.num_patches for sample in members) <= 128


def test_what_a_step_holds_does_not_depend_on_the_ranks(open_loader):
    data = Numbers(50)
    one = open_loader(data)
    four = [open_loader(data, dp_rank=rank, dp_size=4, multiple=2) for rank in range(4)]
    for _ in range(10):
        assert sorted(_names(one.next_step())) == _union(four)


def test_ranks_have_equally_many_micro_batches(open_loader):
    data = Numbers(50)
    steps = [open_loader(data, dp_rank=rank, dp_size=3, multiple=2).next_step() for rank in range(3)]
    counts = {len(step.micro_batches) for step in steps}
    assert len(counts) == 1 and counts.pop() % 2 == 0


@pytest.mark.parametrize("done", [0, 1, 5, 9])
def test_resumed_loader_gives_the_same_samples(done, open_loader):
    data = Numbers(30)
    whole = open_loader(data)
    steps = [_names(whole.next_step()) for _ in range(15)]
    stopped = open_loader(data)
    for _ in range(done):
        stopped.next_step()
    resumed = open_loader(data, prefetch_steps=0)
    resumed.load_state_dict(stopped.state_dict())
    assert [_names(resumed.next_step()) for _ in range(15 - done)] == steps[done:]


def test_resume_with_other_ranks_loses_and_repeats_nothing(open_loader):
    data = Numbers(30)
    whole = open_loader(data)
    wanted = [sorted(_names(whole.next_step())) for _ in range(9)]
    two = [open_loader(data, dp_rank=rank, dp_size=2) for rank in range(2)]
    assert [_union(two) for _ in range(4)] == wanted[:4]
    state = two[1].state_dict()
    assert state == two[0].state_dict()
    three = [open_loader(data, dp_rank=rank, dp_size=3) for rank in range(3)]
    for loader in three:
        loader.load_state_dict(state)
    assert [_union(three) for _ in range(5)] == wanted[4:]


def test_state_counts_returned_steps_not_prefetched_ones(open_loader):
    data = Numbers(100)
    loader = open_loader(data, prefetch_steps=3)
    loader.next_step()
    assert loader.state_dict() == {"seed": 11, "epoch": 0, "position": 8}
    loader.close()
    assert data.fetched >= 8


def test_going_back_drops_what_was_prepared(open_loader):
    loader = open_loader(Numbers(40))
    start = loader.state_dict()
    first = _names(loader.next_step())
    loader.next_step()
    loader.load_state_dict(start)
    assert _names(loader.next_step()) == first


def test_epoch_is_that_of_the_first_sample(open_loader):
    loader = open_loader(Numbers(12))
    assert [loader.next_step().epoch for _ in range(4)] == [0, 0, 1, 2]


def test_a_batch_may_be_larger_than_the_data(open_loader):
    assert len(_names(open_loader(Numbers(3)).next_step())) == 8


def test_broken_media_keep_their_place_and_are_reported(open_loader, tmp_path):
    data = Numbers(8, broken=frozenset({3}))
    loader = open_loader(data, needs_pixels=True)
    step = loader.next_step()
    (failed,) = step.failed
    assert failed.reason == "image 3 does not decode"
    sample = step.micro_batches[failed.micro_batch][failed.place]
    assert sample.sample_id == "3" and not sample.pixels[0].any()
    assert read_ledger(tmp_path / "ledger.jsonl") == []
    loader.note(step)
    (record,) = read_ledger(tmp_path / "ledger.jsonl")
    assert (record["kind"], record["source"], record["line"]) == ("unreadable", "numbers.jsonl", 4)


def test_ranks_that_share_decoding_open_each_sample_once(open_loader):
    loaders = [open_loader(Numbers(8), needs_pixels=True, decode_rank=rank, decode_size=3) for rank in range(3)]
    steps = [loader.next_step() for loader in loaders]
    assert len({tuple(_names(step)) for step in steps}) == 1
    decoded = [[s for members in step.micro_batches for s in members if s.pixels[0].any()] for step in steps]
    pictures = [s.sample_id for members in steps[0].micro_batches for s in members if s.num_patches]
    assert sorted(s.sample_id for samples in decoded for s in samples) == sorted(pictures)
    patches = [sum(s.num_patches for s in samples) for samples in decoded]
    assert max(patches) - min(patches) <= max(s.num_patches for samples in decoded for s in samples)


def test_a_broken_sample_is_reported_by_the_rank_that_opens_it(open_loader):
    data = [Numbers(8, broken=frozenset({3})) for _ in range(2)]
    loaders = [open_loader(d, needs_pixels=True, decode_rank=rank, decode_size=2) for rank, d in enumerate(data)]
    failed = [problem.sample_id for loader in loaders for problem in loader.next_step().failed]
    assert failed == ["3"]


def test_ranks_without_pixels_decode_nothing(open_loader):
    step = open_loader(Numbers(8, broken=frozenset({3}))).next_step()
    assert step.failed == []
    assert {sample.pixels is None for members in step.micro_batches for sample in members} == {True}


def test_an_error_in_a_thread_reaches_the_caller(open_loader, monkeypatch):
    data = Numbers(8)

    def fail(number, *, with_pixels):
        raise ValueError("rows.jsonl has changed since it was indexed")

    monkeypatch.setattr(data, "get", fail)
    with pytest.raises(ValueError, match="has changed"):
        open_loader(data).next_step()


def test_a_state_of_more_data_is_refused(open_loader):
    with pytest.raises(ValueError, match="stands at sample 90 of an epoch but there are 30 samples"):
        open_loader(Numbers(30)).load_state_dict({"seed": 1, "epoch": 0, "position": 90})


def test_close_leaves_no_threads(open_loader):
    before = threading.active_count()
    loader = open_loader(Numbers(50), decode_threads=4)
    loader.next_step()
    loader.close()
    loader.close()
    assert threading.active_count() == before


def test_filled_steps_go_through_epoch_after_epoch_without_a_gap(open_loader):
    loader = open_loader(Numbers(97), micro_batches=4)
    names = [name for _ in range(12) for name in _names(loader.next_step())]
    state = loader.state_dict()
    times = np.bincount([int(name) for name in names], minlength=97)
    assert state["epoch"] >= 1
    assert len(names) == 97 * state["epoch"] + state["position"]
    assert set(times) <= {state["epoch"], state["epoch"] + 1}
    assert (times > state["epoch"]).sum() == state["position"]


def test_filled_steps_are_the_same_samples_for_any_number_of_ranks(open_loader):
    alone = open_loader(Numbers(97), micro_batches=4)
    ranks = [open_loader(Numbers(97), micro_batches=4, dp_rank=rank, dp_size=4) for rank in range(4)]
    for _ in range(5):
        assert sorted(_names(alone.next_step())) == _union(ranks)


def test_filled_steps_continue_exactly(open_loader):
    loader = open_loader(Numbers(97), micro_batches=4)
    for _ in range(7):
        loader.next_step()
    other = open_loader(Numbers(97), micro_batches=4)
    other.load_state_dict(loader.state_dict())
    assert [_names(loader.next_step()) for _ in range(9)] == [_names(other.next_step()) for _ in range(9)]


def test_a_data_set_smaller_than_a_step_is_gone_through_several_times(open_loader):
    loader = open_loader(Numbers(3), micro_batches=8)
    assert len(_names(loader.next_step())) > 6
    assert loader.state_dict()["epoch"] >= 2
