import hashlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rb.value.hops import hop_label, progress
from megatron_rb.value.sampling import (
    GAP_BINS,
    SCORE_BINS,
    PairRules,
    balanced_pairs,
    cell_quotas,
    episode_generator,
    sample_pairs,
    share_out,
    zero_pairs,
)


def one_by_one(available, total, order):
    """Hand out single pieces, round by round."""
    given_out = [0] * len(available)
    while total and any(g < a for g, a in zip(given_out, available, strict=True)):
        for place in order:
            if total and given_out[place] < available[place]:
                given_out[place] += 1
                total -= 1
    return given_out


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 60), st.randoms())
def test_sharing_out_equals_handing_out_one_by_one(available, total, random):
    order = list(range(len(available)))
    random.shuffle(order)
    assert share_out(np.array(available), total, np.array(order)).tolist() == one_by_one(available, total, order)


def test_quotas_by_hand():
    sizes = np.zeros((SCORE_BINS, GAP_BINS), dtype=np.int64)
    sizes[0], sizes[12], sizes[24] = [9, 9, 9, 9], [1, 5, 0, 0], [0, 0, 0, 2]
    # 13 over three bins: 2 is all that bin 24 has, so 11 are left for two: 6 for the central one, 5 for bin 0
    quotas = cell_quotas(sizes, 13)
    assert quotas[12].tolist() == [1, 5, 0, 0]
    assert quotas[24].tolist() == [0, 0, 0, 2]
    assert quotas[0].tolist() == [2, 1, 1, 1]
    assert quotas.sum() == 13


@pytest.mark.parametrize("num_states", [2, 3, 9, 40, 700])
def test_pairs_are_distinct_with_the_labels_of_their_states(num_states):
    before, after, hop = balanced_pairs(num_states, 200, episode_generator(0, "e"))
    assert len(set(zip(before.tolist(), after.tolist(), strict=True))) == len(hop)
    assert len(hop) == min(200, num_states * (num_states - 1))
    phi = progress(num_states)
    expected = [hop_label(phi[p], phi[q]) for p, q in zip(before, after, strict=True)]
    np.testing.assert_allclose(hop, expected, atol=1e-12)


def test_long_episodes_fill_all_score_and_gap_bins_evenly():
    before, after, hop = balanced_pairs(700, 1000, episode_generator(1, "long"))
    score = np.minimum((hop + 1) / 2 * SCORE_BINS, SCORE_BINS - 1).astype(int)
    assert np.bincount(score, minlength=SCORE_BINS).tolist() == [40] * SCORE_BINS
    central = np.abs(hop) < 0.04
    gaps = (np.abs(after - before)[central] - 1) * GAP_BINS // 698
    # a hop near zero cannot be long, so its bin takes from the short gaps what the others lack
    assert np.bincount(gaps, minlength=GAP_BINS)[0] == 40
    large = hop > 0.92
    gaps = np.minimum((np.abs(after - before)[large] - 1) * GAP_BINS // 698, 3)
    assert np.bincount(gaps, minlength=GAP_BINS).tolist() == [10, 10, 10, 10]


def test_five_percent_are_zero_hops():
    states = list(range(0, 4000, 10))
    pairs = sample_pairs(states, PairRules(pairs_per_episode=1000), episode_generator(2, "e"))
    zero = pairs.hop == 0
    assert len(pairs) == 1000 and 25 <= zero.sum() <= 80
    assert (np.abs(pairs.progress[zero, 0] - pairs.progress[zero, 1]) <= 0.05).all()
    assert (np.abs(pairs.before[zero] - pairs.after[zero]) <= 2).all()
    gains = pairs.progress[:, 1] > pairs.progress[:, 0]
    assert (gains[~zero] == (pairs.hop[~zero] > 0)).all()


def test_zero_rules_differ_where_states_are_neighbouring_frames():
    frames = np.arange(10)
    states, paper = zero_pairs(frames, 50, PairRules(), episode_generator(0, "z"))
    assert (paper == frames[states]).all()
    states, released = zero_pairs(frames, 50, PairRules(zero_rule="released"), episode_generator(0, "z"))
    assert (np.abs(released - frames[states]) == 1).all() and released.min() >= 0 and released.max() <= 9


def test_released_zero_frames_by_hand():
    frames = np.array([0, 40, 100])
    states, zero = zero_pairs(frames, 60, PairRules(zero_rule="released"), episode_generator(3, "z"))
    # windows 40, 100 and 60 frames: floor(7.5 %) = 3, 7, 4; at the ends there is one side only
    expected = {0: {3}, 1: {33, 47}, 2: {96}}
    assert {s: set(zero[states == s].tolist()) for s in (0, 1, 2)} == expected


def digest() -> str:
    pairs = sample_pairs(list(range(0, 900, 7)), PairRules(300), episode_generator(5, "lift_003"))
    content = np.stack([pairs.before, pairs.after]).astype("<i8").tobytes() + np.round(pairs.hop, 9).tobytes()
    return hashlib.sha256(content).hexdigest()


def test_pairs_depend_on_seed_and_episode_only():
    code = "from tests.unit.value.test_sampling import digest; print(digest())"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": salt, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for salt in ("1", "2")
    }
    assert outputs == {digest()}
    assert digest() == "9deeb6d3b80894315211d6255b49033941d4f195be879bd70d1e06c242fbfd0c"
    other = sample_pairs(list(range(0, 900, 7)), PairRules(300), episode_generator(5, "lift_004"))
    same = sample_pairs(list(range(0, 900, 7)), PairRules(300), episode_generator(5, "lift_003"))
    assert other.before.tolist() != same.before.tolist()


def test_rules_out_of_range_are_refused():
    with pytest.raises(ValueError, match="zero share of 2"):
        PairRules(zero_share=2)
    with pytest.raises(ValueError, match="zero rule 'x'"):
        PairRules(zero_rule="x")
