"""First weights of a run: each tensor is read by one of the ranks that hold it, and all of them have it."""

from collections import Counter, defaultdict

import pytest

from megatron_rb.shapes.shape import load_shape
from tests.distributed.world import run_world
from tests.parity.tiny_models import write_model

STARTS = "tests.distributed.cases_first_weights:starts"
WORLD = 4
FAMILY = "qwen2_5_vl"


def cases_of(hf: str) -> list[dict]:
    shape = load_shape(hf)
    vision, text = shape.vision.num_layers, shape.text.num_layers
    whole, halves = f"P v*{vision} M E t*{text} L", f"P v*{vision} M E t*1 | t*{text - 1} L"
    files = [
        {"tp": 1, "pp": 1, "layout": whole},
        {"tp": 2, "pp": 1, "layout": whole},
        {"tp": 1, "pp": 2, "layout": halves},
        {"tp": 1, "pp": 1, "cp": 2, "layout": whole},
        {"tp": 2, "pp": 2, "layout": halves},
    ]
    return [case | {"hf": hf} for case in [*files, files[1] | {"init": "random"}]]


@pytest.fixture(scope="module", params=[False, True], ids=["own head", "tied embeddings"])
def starts(request, tmp_path_factory):
    """Per case what every rank found."""
    hf = str(write_model(tmp_path_factory.mktemp("first") / "hf", FAMILY, seed=int(request.param)))
    assert load_shape(hf).text.tied_embeddings == request.param
    return list(zip(*run_world(STARTS, WORLD, timeout=100, cases=cases_of(hf)), strict=True))


def of_place(ranks) -> list[list[dict]]:
    """Ranks that hold the same weights, together."""
    together = defaultdict(list)
    for rank in ranks:
        together[tuple(rank["place"])].append(rank)
    return list(together.values())


def test_every_rank_holds_what_it_would_have_read_alone(starts):
    for ranks in starts:
        assert all(rank["weights"] == rank["alone"] and rank["weights"] for rank in ranks)


def test_each_tensor_is_read_by_one_of_the_ranks_that_hold_it(starts):
    for ranks in starts:
        for copies in of_place(ranks):
            assert set(Counter(name for rank in copies for name in rank["read"]).values()) == {1}


def test_ranks_read_about_the_same_number_of_bytes(starts):
    """No rank reads more than its part and one tensor: the largest is the embedding."""
    for ranks in starts:
        for copies in of_place(ranks):
            read = [sum(rank["read"].values()) for rank in copies]
            assert max(read) <= sum(read) / len(read) + max(max(rank["read"].values()) for rank in copies)


def test_a_rank_that_cannot_read_fails_all_ranks_with_its_sentence(tmp_path):
    hf = str(write_model(tmp_path / "hf", FAMILY, seed=1))
    ranks = run_world(STARTS, WORLD, timeout=60, cases=cases_of(hf)[:3], fails_on=2)
    for case in zip(*ranks, strict=True):
        (said,) = {rank["error"] for rank in case}
        assert said.endswith("lies on a disk that is gone (rank 2)")


def test_a_folder_that_one_rank_does_not_see_fails_all_ranks(tmp_path):
    hf = str(write_model(tmp_path / "hf", FAMILY, seed=1))
    said = run_world(
        "tests.distributed.cases_first_weights:missing_on", WORLD, timeout=60, case=cases_of(hf)[0], rank=1
    )
    assert len(set(said)) == 1 and "nowhere" in said[0] and said[0].endswith("(rank 1)")
