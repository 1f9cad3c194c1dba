"""The rank that holds the others up is named with its section, and only when it stands out."""

import json

from megatron_rb.metrics.stragglers import RankRecord, RankTimes
from megatron_rb.metrics.writers import RanksFile


def record(*vision: float, stages: tuple[int, ...] = ()) -> RankRecord:
    stages = stages or (0,) * len(vision)
    ranks = [
        RankTimes(rank, stage, {"data": 0.0, "vision": seconds, "language": 0.1, "wait": 0.0})
        for rank, (seconds, stage) in enumerate(zip(vision, stages, strict=True))
    ]
    return RankRecord(50, 1.0, ranks)


def test_slow_rank_and_section_are_named():
    straggler = record(0.2, 0.2, 0.5, 0.2).straggler()
    assert straggler is not None
    assert (straggler.rank, straggler.section, straggler.ratio) == (2, "vision", 2.5)
    assert str(straggler) == "rank 2 in vision (2.5 x its peers)"


def test_usual_differences_are_no_straggler():
    assert record(0.2, 0.21, 0.24, 0.19).straggler() is None


def test_only_ranks_of_the_same_stage_are_compared():
    assert record(0.2, 0.2, 0.9, 0.9, stages=(0, 0, 1, 1)).straggler() is None


def test_file_for_the_launcher_names_the_rank(tmp_path):
    RanksFile(tmp_path / "stragglers.json").write_ranks(record(0.2, 0.2, 0.5))
    written = json.loads((tmp_path / "stragglers.json").read_text())
    assert written["slow"] == "rank 2 in vision (2.5 x its peers)" and len(written["ranks"]) == 3
