"""Every rank writes and reads its own part of a checkpoint: bytes of four ranks, what travels, earlier versions."""

import pytest

from tests.distributed.world import run_world

RANKS = 4
LAYOUTS = [f"tp{tp_size}-{dtype}" for tp_size in (1, 2) for dtype in ("fp32", "bf16")]
KINDS = ("distributed", "replicated")
ON_EVERY_TP_RANK = 41 * 24 + 48
ELEMENTS = ON_EVERY_TP_RANK + 256 * 48 + 48 * 251 + 2 * 251 * 40
"""Of the model of `cases_shares`."""
BYTES = {"fp32-distributed": 4 + 12, "bf16-distributed": 2 + 12, "fp32-replicated": 4 + 8, "bf16-replicated": 2 + 12}
"""Of an element: the weight, its fp32 copy (in fp32 the distributed optimizer's alone), and two moments."""
CUTS = 1100
"""Elements by which shares may differ: buckets are padded to a multiple of 128 elements for each rank, 251 columns or
rows are no even number, and what lies on every tensor-parallel rank is written by the first."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shares")
    return run_world("tests.distributed.cases_shares:everything", world_size=RANKS, timeout=400, folder=str(folder))


def bytes_of(case: str) -> int:
    """Of an element in a checkpoint of a case."""
    return BYTES[case.partition("-")[2]]


CASES = [f"{layout}-{kind}" for layout in LAYOUTS for kind in KINDS]


@pytest.mark.parametrize("case", CASES)
def test_every_byte_is_written_once(ranks, case):
    assert sum(ranks[0][case]["written"]) == ELEMENTS * bytes_of(case)


@pytest.mark.parametrize("case", CASES)
def test_every_rank_writes_an_even_share(ranks, case):
    share = ELEMENTS * bytes_of(case) / RANKS
    for bytes_of_rank in ranks[0][case]["written"]:
        assert bytes_of_rank == pytest.approx(share, abs=CUTS * bytes_of(case))


@pytest.mark.parametrize("case", CASES)
def test_every_rank_reads_its_share_and_no_more(ranks, case):
    tp_size = int(case[2])
    read = [rank[case]["read"] for rank in ranks]
    again = (tp_size - 1) * ON_EVERY_TP_RANK
    assert sum(read) == (ELEMENTS + again) * bytes_of(case)
    assert max(read) <= (ELEMENTS / RANKS + CUTS) * bytes_of(case)


@pytest.mark.parametrize("case", CASES)
def test_no_value_travels_between_ranks_while_saving(ranks, case):
    assert [rank[case]["sent_while_saving"] for rank in ranks] == [0] * RANKS


@pytest.mark.parametrize("case", CASES)
def test_no_rank_is_told_of_the_pieces_of_all_while_saving(ranks, case):
    assert [rank[case]["gathers_while_saving"] for rank in ranks] == [0] * RANKS


def test_a_rank_with_another_small_state_than_rank_0_says_so(ranks):
    words = "has another state than rank 0, whose is saved: loader.rank"
    assert [rank["states"] for rank in ranks] == [[]] + [[f"rank {number} {words}"] for number in (1, 2, 3)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_the_distributed_optimizer_only_weights_travel_while_loading(ranks, layout):
    for rank in ranks:
        case = rank[f"{layout}-distributed"]
        assert case["sent_while_loading"] == case["weights_of_rank"]


@pytest.mark.parametrize("case", CASES)
def test_the_same_layout_has_the_same_bits(ranks, case):
    assert all(rank[case]["equal"] for rank in ranks)


@pytest.mark.parametrize("case", CASES)
def test_weights_alone_are_read_once_by_the_ranks_that_hold_the_same(ranks, case):
    copies = RANKS // int(case[2])
    for rank in ranks:
        assert rank[case]["weights_equal"]
        assert rank[case]["weights_read"] == pytest.approx(rank[case]["weights_of_rank"] / copies, rel=0.02)


def test_another_layout_has_the_same_weights_after_one_more_step(ranks):
    assert ranks[0]["other_layouts"] == {"1-4": 0.0, "4-1": 0.0, "2-1": 0.0, "1-2": 0.0}


@pytest.mark.parametrize("layout", ["same", "other"])
def test_earlier_versions_and_this_one_read_each_other(ranks, layout):
    for rank in ranks:
        assert rank["earlier"][layout]["trained"] and rank["earlier"][layout]["equal"]


@pytest.mark.parametrize(("layout", "factor"), [("same", 1.1), ("other", 1.5)])
def test_what_one_rank_of_an_earlier_version_wrote_is_not_read_whole_by_each(ranks, layout, factor):
    # In another layout columns are read with what lies between them.
    stored = ranks[0]["earlier"][layout]["stored"]
    assert stored == ELEMENTS * BYTES["bf16-distributed"]
    assert sum(rank["earlier"][layout]["read"] for rank in ranks) <= factor * stored


@pytest.mark.parametrize(
    ("what", "words"),
    [("everything", "Input/output error"), ("weights", "Input/output error"), ("contents", "no .metadata")],
)
def test_a_rank_that_cannot_read_fails_all_with_one_sentence(ranks, what, words):
    said = {rank["failing"][what] for rank in ranks}
    assert len(said) == 1
    assert words in said.pop() and all(rank["failing"][what].endswith("(rank 2)") for rank in ranks)


def test_a_tensor_of_another_shape_is_refused_on_every_rank(ranks):
    for rank in ranks:
        assert "rows has the shape [256, 48] there and [255, 48] here; nothing was restored" in rank["shape"]
