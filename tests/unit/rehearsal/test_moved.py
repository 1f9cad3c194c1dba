"""Bytes of machines and of the world from those of some ranks."""

from megatron_rb.layout.mesh import RankGrid
from megatron_rb.rehearsal.moved import summarise_checkpoint
from megatron_rb.rehearsal.records import CheckpointBytes, PeakMemory, Phase, RehearsedRank


def record(rank: int, moved: CheckpointBytes | None, waits: int = 0) -> RehearsedRank:
    peak = PeakMemory(0, {}, [])
    phases = [Phase(name, peak, [("copy", "line", waits)], [], 0, 0, 0, {}, 0.0) for name in ("start", "save", "load")]
    return RehearsedRank(rank, f"rank {rank}", 0, [], phases, [], checkpoint=moved)


def test_without_a_checkpoint_there_is_no_summary():
    assert summarise_checkpoint([record(0, None)], RankGrid.of_world(4, 1), 2) is None


def test_ranks_between_the_first_and_the_last_copy_count_as_the_most_loaded_of_them():
    grid = RankGrid.of_world(8, 2)
    records = [record(0, CheckpointBytes(1, 10, 100)), record(1, CheckpointBytes(2, 20, 200), waits=3)]
    records += [record(6, CheckpointBytes(3, 5, 100)), record(7, CheckpointBytes(2, 20, 200))]
    summary = summarise_checkpoint(records, grid, devices_per_node=4)
    assert summary.rank == CheckpointBytes(3, 20, 200)
    # tp 0: the first copy moves 1, the last 3, those between as much as the most loaded.
    assert summary.node == CheckpointBytes(10, 60, 600)
    assert summary.world == CheckpointBytes(1 + 3 + 3 + 3 + 4 * 2, 10 + 10 + 10 + 5 + 4 * 20, 4 * 100 + 4 * 200)
    assert summary.waits == {"save": [("copy", "line", 3)], "load": [("copy", "line", 3)]}
