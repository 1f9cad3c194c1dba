import numpy as np
import pytest

from megatron_rb.value.hops import hop_label, hop_labels, progress, sample_states


def test_every_sub_task_gives_the_same_number_of_states():
    # 13 frames, 3 sub-tasks: m = floor(13 / 3) = 4, but the shortest sub-task has 3 frames
    assert sample_states([0, 3, 8, 12]) == [0, 1, 2, 3, 5, 6, 8, 9, 11, 12]


def test_chunk_thins_the_states():
    # m = floor(floor(21 / 5) / 2) = 2
    assert sample_states([0, 10, 20], chunk=5) == [0, 5, 10, 15, 20]


def test_progress_is_aligned_to_key_frames():
    states = sample_states([0, 3, 9])
    assert progress(len(states))[states.index(3)] == 0.5


@pytest.mark.parametrize(
    ("before", "after", "label"),
    [(0.0, 1.0, 1.0), (0.0, 0.25, 0.25), (0.5, 0.75, 0.5), (0.75, 0.25, -2 / 3), (1.0, 0.0, -1.0), (0.5, 0.5, 0.0)],
)
def test_hop_is_relative_to_what_was_left_or_done(before, after, label):
    assert hop_label(before, after) == pytest.approx(label)


def test_hop_stays_in_range_for_every_pair():
    phi = progress(9)
    labels = [hop_label(p, q) for p in phi for q in phi if p < 1 or q < 1]
    assert min(labels) == -1.0 and max(labels) == 1.0


def test_no_hop_forward_from_the_goal():
    with pytest.raises(ValueError, match="goal"):
        hop_label(1.0, 1.0)


def test_released_rule_rounds_where_the_paper_floors():
    # 40 frames from first to last, chunk 5, 3 sub-tasks: floor(floor(41 / 5) / 3) = 2, round(40 / 5 / 3) = 3
    keys = [0, 12, 24, 40]
    assert sample_states(keys, chunk=5) == [0, 6, 12, 18, 24, 32, 40]
    assert sample_states(keys, chunk=5, rule="released") == [0, 4, 8, 12, 16, 20, 24, 29, 35, 40]


def test_released_rule_counts_from_the_first_to_the_last_frame():
    # 20 frames on: round(20 / 7 / 2) = round(1.43) = 1; 21 frames would make it 2
    assert sample_states([0, 10, 20], chunk=7, rule="released") == [0, 10, 20]


def test_many_labels_at_once_are_those_of_one_by_one():
    pairs = [(p, q) for p in range(7) for q in range(7) if p != q]
    before, after = np.array(pairs).T
    phi = progress(7)
    expected = [hop_label(phi[p], phi[q]) for p, q in pairs]
    np.testing.assert_allclose(hop_labels(before, after, 7), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("keys", [[5], [0, 4, 4], [3, 1]])
def test_key_frames_must_rise(keys):
    with pytest.raises(ValueError, match="rising"):
        sample_states(keys)
