"""What the ranks of a benchmark found, put together."""

from dataclasses import astuple

from megatron_rb.bench.train.measure import works_of_replicas
from megatron_rb.models.work import Work


def test_context_parallel_ranks_add_up_and_their_samples_count_once():
    parts = [Work(3, 10, 2, 8, 60, 20, 0), Work(3, 6, 1, 4, 40, 10, 0)]
    other = Work(2, 7, 1, 0, 49, 0, 0)
    # Ranks in order: two context-parallel ones of replica 0, one without a voice, and one of replica 1.
    entries = [
        (0, 1.0, 0.0, [astuple(parts[0])]),
        (0, 1.0, 0.0, [astuple(parts[1])]),
        (-1, 1.0, 0.0, [astuple(parts[1])]),
        (1, 1.0, 0.0, [astuple(other)]),
    ]
    assert works_of_replicas(entries, 2) == [[Work(3, 16, 3, 12, 100, 30, 0)], [other]]
