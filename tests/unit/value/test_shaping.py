import numpy as np
import pytest

from megatron_rb.value.shaping import gold_reward, naive_reward, shaped_reward

GAMMA = 0.9
PHI = np.array([0.0, 0.6, 0.6, 0.3, 1.0])
"""Progress of the states of a small decision process; state 4 is the goal, where a run stays."""
NEXT = np.array([[1, 3], [2, 4], [1, 1], [4, 0], [4, 4]])
"""[state, action] -> state. From 0 the way over 3 reaches the goal in two steps; so does the way over 1."""


def best_values(reward: np.ndarray) -> np.ndarray:
    """Q [state, action] by value iteration."""
    q = np.zeros(NEXT.shape)
    for _ in range(2000):
        q = reward + GAMMA * q.max(axis=1)[NEXT]
    return q


def of_transitions(function, **options) -> np.ndarray:
    return function(np.repeat(PHI[:, None], 2, axis=1), PHI[NEXT], **options)


def best_actions(q: np.ndarray) -> list[set[int]]:
    return [set(np.flatnonzero(np.isclose(row, row.max())).tolist()) for row in q]


def test_shaping_keeps_every_optimal_action_and_shifts_values_by_progress():
    gold = best_values(gold_reward(PHI[NEXT]))
    shaped = best_values(of_transitions(shaped_reward, gamma=GAMMA))
    assert best_actions(shaped) == best_actions(gold)
    np.testing.assert_allclose(shaped, gold - PHI[:, None], atol=1e-9)


def test_naive_difference_changes_what_is_optimal():
    gold = best_values(gold_reward(PHI[NEXT]))
    naive = best_values(of_transitions(naive_reward))
    # with the gold term alone both ways from 0 are equally good; the plain difference prefers early progress
    assert best_actions(gold)[0] == {0, 1}
    assert best_actions(naive)[0] == {0}


def test_naive_difference_makes_circling_pay():
    """A loop that climbs slowly and falls fast earns nothing undiscounted; discounted it is worth more than waiting."""
    phi = np.array([0.5, 0.9])
    loop = naive_reward(np.array([phi[0], phi[1]]), np.array([phi[1], phi[0]]))
    discounted = sum(0.9**t * loop[t % 2] for t in range(200))
    stay = naive_reward(np.array([0.5]), np.array([0.5]))[0]
    assert loop.sum() == pytest.approx(0) and discounted > 0.2 > stay == 0
    shaped = shaped_reward(np.array([phi[0], phi[1]]), np.array([phi[1], phi[0]]), gamma=0.9)
    stays = shaped_reward(np.array([0.5]), np.array([0.5]), gamma=0.9)[0]
    assert sum(0.9**t * shaped[t % 2] for t in range(400)) == pytest.approx(sum(0.9**t * stays for t in range(400)))


def test_shaping_telescopes_to_minus_the_first_progress():
    path = np.random.default_rng(0).uniform(0, 0.9, 300)
    rewards = shaped_reward(path[:-1], path[1:], gamma=0.95)
    assert sum(0.95**t * r for t, r in enumerate(rewards)) == pytest.approx(-path[0], abs=1e-5)


def test_gold_reward_starts_at_one_minus_delta():
    assert gold_reward(np.array([0.94, 0.95, 1.0])).tolist() == [0.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="discount 0"):
        shaped_reward(np.zeros(1), np.zeros(1), gamma=0.0)
