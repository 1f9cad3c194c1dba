import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rb.scores.answer_metrics import box_iou, iou_at, mean_relative_accuracy, plan_match, ratio_success
from megatron_rb.scores.trace3d import (
    OrientedBox,
    TraceScene,
    collides,
    score_trace,
    summarise,
)
from megatron_rb.scores.trace_metrics import discrete_frechet, hausdorff, rmse_resampled, rmse_shared
from megatron_rb.scores.value_metrics import evaluation_frames, spearman, voc_minus, voc_plus
from megatron_rb.spatial.tsdf import OccupiedVoxels, occupied_voxels

A, B = np.array([[0, 0], [1, 0], [2, 0]]), np.array([[0, 1], [2, 3]])


def walks(n, m):
    """Every way two walkers can go from (0, 0) to (n - 1, m - 1)."""
    if (n, m) == (1, 1):
        return [[(0, 0)]]
    before = [(i, j) for i, j in ((n - 1, m), (n, m - 1), (n - 1, m - 1)) if i and j]
    return [[*walk, (n - 1, m - 1)] for i, j in before for walk in walks(i, j)]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 5))
def test_frechet_is_the_best_of_all_walks(seed, n, m):
    rng = np.random.default_rng(seed)
    a, b = rng.uniform(size=(n, 2)), rng.uniform(size=(m, 2))
    best = min(max(np.linalg.norm(a[i] - b[j]) for i, j in walk) for walk in walks(n, m))
    assert discrete_frechet(a, b) == pytest.approx(best)


def test_trace_distances_by_hand():
    # pairs (0,0) 1, (1,0) sqrt 2, (2,1) 3: the walk must end with (2, 1)
    assert discrete_frechet(A, B) == 3.0
    # from B: (2, 3) is 3 from A; from A: (2, 0) is sqrt 5 from (0, 1)
    assert hausdorff(A, B) == 3.0 and hausdorff(B, A) == 3.0
    # first two points: 1 and sqrt(1 + 9)
    assert rmse_shared(A, B) == pytest.approx(math.sqrt((1 + 10) / 2))
    # a line against itself moved by 3 in y
    assert rmse_resampled(A, np.array([[0, 3], [2, 3]])) == pytest.approx(3.0)
    # 100 points by arc length, k / 99 away from the one point: sqrt(sum of squares 0..99 / 99^2 / 100)
    assert rmse_resampled([[0, 0], [1, 0]], [[0, 0]]) == pytest.approx(math.sqrt(328350 / 980100))
    # three samples by arc length: (0,0) (1,0) (2,0) and (0,1) (1,2) (2,3)
    assert rmse_resampled(A, B, count=3) == pytest.approx(math.sqrt((1 + 4 + 9) / 3))


def test_traces_need_a_point():
    with pytest.raises(ValueError, match="at least one point"):
        discrete_frechet(np.zeros((0, 2)), A)


def test_iou_by_hand():
    # overlap 1 x 2 of boxes 2 x 2 and 2 x 2: 2 / (4 + 4 - 2)
    assert box_iou([0, 0, 2, 2], [1, 0, 3, 2]) == pytest.approx(1 / 3)
    assert box_iou([0, 0, 2, 2], [2, 2, 3, 3]) == 0.0 and box_iou([1, 1, 1, 1], [1, 1, 1, 1]) == 0.0
    assert iou_at([0.5, 0.74, 0.9, 0.0], 0.5) == 0.75


def test_ratio_and_relative_accuracy_by_hand():
    assert [ratio_success(p, 10.0) for p in (4.9, 5.0, 20.0, 20.1, float("nan"))] == [False, True, True, False, False]
    # error .12 is below .5 .45 .40 .35 .30 .25 .20 .15, not below .10 and .05
    assert mean_relative_accuracy(112.0, 100.0) == pytest.approx(0.8)
    assert mean_relative_accuracy(100.0, 100.0) == 1.0 and mean_relative_accuracy(150.0, 100.0) == 0.0
    # at the border itself a threshold is not met: .10 is below .5 ... .15 only
    assert mean_relative_accuracy(90.0, 100.0) == pytest.approx(0.8)
    assert mean_relative_accuracy(90.0, 100.0, border_met=True) == pytest.approx(0.9)
    assert mean_relative_accuracy(150.0, 100.0, border_met=True) == pytest.approx(0.1)
    assert mean_relative_accuracy(float("nan"), 3.0) == 0.0
    with pytest.raises(ValueError, match="must be positive"):
        ratio_success(1.0, 0.0)


def test_plans_match_as_json():
    plan = {"subtask_list": [{"robot_name": "a", "subtask": "go", "subtask_order": "0"}]}
    assert plan_match(json.dumps(plan, indent=2), plan) and plan_match(
        f"```json\n{json.dumps(plan)}\n```", json.dumps(plan)
    )
    assert not plan_match(json.dumps(plan | {"more": 1}), plan) and not plan_match("go there", plan)
    assert plan_match(f"<think>[1]</think><answer>{json.dumps(plan)}</answer>", plan)
    assert not plan_match("[" * 100_000, plan) and not plan_match("1" * 5000, plan)


def brute_spearman(values):
    """Pearson correlation of ranks counted pair by pair."""
    rank = [sum(v < w for v in values) + (sum(v == w for v in values) - 1) / 2 for w in values]
    n, time = len(values), list(range(len(values)))
    mean_rank, mean_time = sum(rank) / n, sum(time) / n
    cov = sum((r - mean_rank) * (t - mean_time) for r, t in zip(rank, time, strict=True))
    scale = sum((r - mean_rank) ** 2 for r in rank) * sum((t - mean_time) ** 2 for t in time)
    return cov / math.sqrt(scale) if scale else 0.0


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=12))
def test_spearman_equals_counting(values):
    assert spearman(values) == pytest.approx(brute_spearman(values), abs=1e-9)


def test_voc_by_hand():
    assert voc_plus([0.5, 0.5, 0.5]) == pytest.approx(1.0)
    # progress 0, .5, .25, .625: ranks 1 3 2 4 against 1 2 3 4: 1 - 6 * 2 / (4 * 15)
    assert voc_plus([0.5, -0.5, 0.5]) == pytest.approx(0.8)
    # swapped pairs fall from 1 at the end to the start: 1, .5, .25 back in order of time .25 .5 1
    assert voc_minus([-0.5, -0.5]) == pytest.approx(1.0)
    assert voc_minus([0.5, 0.5]) == 0.0  # stays at 1: no order
    assert voc_plus([0.0, 0.0]) == 0.0 and voc_plus([-0.5, 0.0, float("nan")]) == 0.0
    # only the last pair says what is true: 1 1 .5 in reverse is .5 .5 .5 -> time order ranks 1 1 2
    assert voc_minus([0.0, -0.5]) == pytest.approx(brute_spearman([0.5, 0.5, 1.0]))


def test_evaluation_frames_are_evenly_spaced_with_both_ends():
    assert evaluation_frames(120) == [0, 40, 79, 119]
    assert evaluation_frames(40) == [0, 39] and evaluation_frames(5, 1) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="at least 2 frames"):
        evaluation_frames(1)


BOX = OrientedBox(np.array([1.0, 0, 2.0]), np.array([0.4, 0.4, 0.2]), np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1.0]]))
CLOUD = np.array([[x, 0.0, 1.0] for x in (-0.02, -0.01, 0.0, 0.01, 0.02)])
INTRINSICS = np.array([[100.0, 0, 50], [0, 100.0, 50], [0, 0, 1]])


def wall(depth_metres: float) -> OccupiedVoxels:
    """A wall over the right half of the picture."""
    depth = np.zeros((100, 100))
    depth[:, 50:] = depth_metres
    return occupied_voxels(depth, INTRINSICS)


def test_distance_to_a_turned_box_by_hand():
    long = OrientedBox(np.zeros(3), np.array([2.0, 1.0, 1.0]), np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1.0]]))
    # its long side lies along world y: 1 m to both sides; x reaches half a metre
    np.testing.assert_allclose(
        long.distance(np.array([[0, 0.9, 0], [0, 1.5, 0], [1.5, 0, 0], [0.8, 1.4, 0]])), [0, 0.5, 1.0, 0.5]
    )


def test_trace_scores_by_hand():
    scene = TraceScene(np.array([0, 0, 1.0]), CLOUD, BOX, wall(1.5))
    free = np.array([[0, 0.1, 1.0], [0.5, 0, 1.2], [1.0, 0, 1.95]])
    score = score_trace(free, scene)
    assert (score.start, score.end, score.collision, score.success) == (True, True, False, True)
    through = np.array([[0, 0, 1.0], [0.3, 0, 1.5], [1.0, 0, 1.95]])
    score = score_trace(through, scene)
    assert score.collision and not score.success
    # end: 0.20 m is outside the reach, and only the last three points count
    far = np.array([[0, 0, 1.0], [1.0, 0, 1.95], [0, 0, 1], [0, 0, 1], [0, 0, 1.0]])
    assert score_trace(far, scene).end is False
    start = score_trace(np.array([[0.23, 0, 1.0], [1.0, 0, 1.95]]), scene)
    assert start.start is False
    # 0.205 m from the outermost point, 0.225 m from the true start
    assert score_trace(np.array([[0.225, 0, 1.0], [1.0, 0, 1.95]]), scene).start is False
    near_cloud = score_trace(np.array([[0.21, 0, 1.0], [1.0, 0, 1.95]]), scene)
    assert near_cloud.start is True  # 0.19 m from the object's outermost point


def test_collision_needs_more_than_a_fifth_of_the_points():
    # one of five points (exactly 20 %) reaches the wall at 1.5 m: not a collision; two of five are one
    reaching, apart = [0.3, 0, 1.0], [0.3, 0, 0.7]
    trace = np.array([[0.3, 0, 1.2], [0.3, 0, 1.7]])  # half a metre on, wherever the object's centre is
    assert not collides(trace, np.array([reaching] + [apart] * 4), wall(1.5))
    assert collides(trace, np.array([reaching] * 2 + [apart] * 3), wall(1.5))
    assert collides(trace, np.array([reaching] + [apart] * 3), wall(1.5))  # a quarter
    # where the object stands, before it is moved, counts too; nothing between two points does
    assert collides(trace[:1], np.array([[0.3, 0, 1.5]]), wall(1.5))
    assert not collides(np.array([[0, 0, 1.0], [0, 0, 2.0]]), np.array([[0.3, 0, 1.0]]), wall(1.5))


def test_a_short_trace_ends_with_its_last_point():
    scene = TraceScene(np.array([0, 0, 1.0]), CLOUD, BOX, wall(1.5))
    back = np.array([[1.0, 0, 1.95], [0, 0, 1.0]])
    assert score_trace(back, scene).end is False
    assert score_trace(np.concatenate([back, back[1:]]), scene).end is True


def test_unread_answers_fail_and_samples_without_depth_leave_two_denominators():
    seen = TraceScene(np.array([0, 0, 1.0]), CLOUD, BOX, wall(1.5))
    blind = TraceScene(np.array([0, 0, 1.0]), CLOUD, BOX, None)
    good = np.array([[0, 0, 1.0], [1.0, 0, 1.95]])
    result = summarise([score_trace(good, seen), score_trace(None, seen), score_trace(good, blind)])
    assert result == {"start": 0.5, "end": 0.5, "collision": 0.0, "success": pytest.approx(1 / 3)}
