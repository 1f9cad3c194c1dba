import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rb.value.hops import hop_label
from megatron_rb.value.reconstruct import (
    METHODS,
    Consistency,
    OnlineProgress,
    backward_anchored,
    completion,
    conservative,
    forward_anchored,
    fused,
    incremental,
    reconstruct,
)

ANY = st.floats(allow_nan=True, allow_infinity=True)
"""What a model may say: also beyond 100 %, infinite, unreadable."""
TRIPLES = st.lists(st.tuples(ANY, ANY, ANY), min_size=1, max_size=40)


def test_incremental_by_hand():
    # 0 + 1 * .5 = .5; .5 + .5 * .5 = .75; .75 - .75 / 3 = .5; .5 + .5 * 1 = 1; 1 - 1 * .2 = .8
    np.testing.assert_allclose(incremental([0.5, 0.5, -1 / 3, 1.0, -0.2]), [0, 0.5, 0.75, 0.5, 1.0, 0.8])
    np.testing.assert_allclose(incremental([-0.25], start=1.0), [1.0, 0.75])


def test_true_hops_give_true_progress_by_every_method():
    phi = [0.0, 0.2, 0.5, 0.4, 0.9, 1.0]
    steps = [hop_label(a, b) for a, b in zip(phi[:-1], phi[1:], strict=True)]
    start = [hop_label(0.0, b) for b in phi[1:]]
    goal = [b - 1.0 for b in phi[1:]]
    for method in METHODS:
        if method in ("conservative", "fused"):
            continue  # both lag behind or average by design; by hand below
        np.testing.assert_allclose(reconstruct(method, steps, start, goal), phi, atol=1e-12)
    np.testing.assert_allclose(fused(steps, start, goal), phi, atol=1e-12)


def test_fused_by_hand():
    # frame 1: (0.3 + 0.6 + 0.9) / 3 = 0.6; frame 2: loss of half of 0.6 = 0.3; (0.3 + 0.0 + 0.6) / 3 = 0.3
    np.testing.assert_allclose(fused([0.3, -0.5], [0.6, -0.4], [-0.1, -0.4]), [0, 0.6, 0.3])


def test_conservative_by_hand():
    # anchors agree at .4: w = 1, step .5: 0 + 1/2 (.4 - 0 + .5) = .45
    # anchors .2 and .6: mean .4, difference 1, w = exp(-2): .45 + w/2 (.4 - .45 - .45 * .2)
    weight = math.exp(-2.0)
    expected = [0, 0.45, 0.45 + weight / 2 * (0.4 - 0.45 - 0.09)]
    curve = conservative([0.5, -0.2], [0.4, 0.2], [-0.6, -0.4], Consistency(alpha=2.0, epsilon=1e-15))
    np.testing.assert_allclose(curve, expected, atol=1e-12)


def test_contradicting_anchors_freeze_progress():
    curve = conservative([0.5, 1.0, 1.0], [0.5, 0.0, 1.0], [-0.5, 0.0, -1.0])
    assert curve[1] == pytest.approx(0.5) and curve[1:] == pytest.approx(curve[1], abs=1e-9)


def test_wrong_signs_are_clamped_at_both_anchors():
    assert forward_anchored([-0.4, 0.2]).tolist() == [0.0, 0.0, 0.2]
    assert backward_anchored([0.3, -1.0]).tolist() == [0.0, 1.0, 0.0]


def test_unreadable_answers_move_nothing():
    nan = float("nan")
    np.testing.assert_allclose(incremental([0.5, nan, 0.5]), [0, 0.5, 0.5, 0.75])
    np.testing.assert_allclose(forward_anchored([0.5, nan, 0.6]), [0, 0.5, 0.5, 0.6])
    np.testing.assert_allclose(backward_anchored([nan, -0.3, nan]), [0, 0.0, 0.7, 0.7])


@settings(max_examples=300, deadline=None)
@given(TRIPLES, st.sampled_from(METHODS), st.floats(0, 1e6))
def test_every_curve_stays_in_bounds_for_any_answers(triples, method, alpha):
    curve = reconstruct(method, *zip(*triples, strict=True), Consistency(alpha))
    assert len(curve) == len(triples) + 1
    assert np.isfinite(curve).all() and curve.min() >= 0.0 and curve.max() <= 1.0


@settings(max_examples=300, deadline=None)
@given(st.floats(0, 1), st.floats(-1, 1))
def test_one_step_of_the_proof_needs_no_clamp(value, hop):
    """G' = G + H (1 - G) or G (1 + H) lies in [0, 1] by itself: what the paper proves, up to rounding."""
    moved = value + (1 - value) * hop if hop >= 0 else value + value * hop
    assert -1e-15 <= moved <= 1 + 1e-15
    assert incremental([hop], start=value)[1] == pytest.approx(moved, abs=1e-15)


@settings(max_examples=300, deadline=None)
@given(st.floats(0, 1), st.floats(-1, 1), st.floats(0, 1), st.floats(0, 1))
def test_conservative_step_is_a_convex_combination(value, hop, ahead, back):
    rule = Consistency()
    back = 1.0 + (back - 1.0)  # as an answer says it: 1 + H, rounded
    weight = rule.weight(ahead, back)
    stepped = value + (1 - value) * hop if hop >= 0 else value + value * hop
    mean = (ahead + back) / 2
    online = OnlineProgress("conservative", rule)
    online.value = value
    expected = (1 - weight) * value + weight / 2 * mean + weight / 2 * stepped
    assert online.update(hop, ahead, back - 1.0) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(TRIPLES, st.sampled_from(METHODS))
def test_online_and_batch_form_agree(triples, method):
    online = OnlineProgress(method)
    curve = [online.value, *(online.update(*triple) for triple in triples)]
    np.testing.assert_allclose(curve, reconstruct(method, *zip(*triples, strict=True)), rtol=0, atol=1e-12)


def test_completion_labels():
    assert completion(np.array([0, 0.5, 0.9])) == "success"
    # the last third is .45 and .85: mean .65; and .31 and .85: mean .58
    assert completion(np.array([0, 0, 0, 0, 0.45, 0.85])) == "success"
    assert completion(np.array([0, 0, 0, 0, 0.31, 0.85])) == "partial"
    assert completion(np.array([0, 0.1, 0.2, 0.2, 0.5, 0.5])) == "partial"
    assert completion(np.array([0, 0.9, 0.3])) == "failure"


def test_hops_of_different_length_are_refused():
    with pytest.raises(ValueError, match="2 hops between neighbours, 1 from the start"):
        fused([0.1, 0.1], [0.1], [0.1, 0.1])
    with pytest.raises(ValueError, match="method 'mean'"):
        OnlineProgress("mean")


@pytest.mark.parametrize("wrong", [{"alpha": -1.0}, {"alpha": math.nan}, {"epsilon": 0.0}, {"epsilon": math.inf}])
def test_a_weight_outside_its_range_is_refused(wrong):
    with pytest.raises(ValueError, match="alpha of at least 0"):
        Consistency(**wrong)


def test_weight_by_hand():
    # .2 and .6 differ by .4, their mean is .4: exp(-20 * 1) ; .45 and .55: .1 / .5 = .2, exp(-20 * .04) = exp(-.8)
    assert Consistency().weight(0.2, 0.6) == pytest.approx(math.exp(-20), rel=1e-3)
    assert Consistency().weight(0.45, 0.55) == pytest.approx(math.exp(-0.8), rel=1e-4)
    assert Consistency().weight(0.3, 0.3) == Consistency().weight(0.0, 0.0) == 1.0
