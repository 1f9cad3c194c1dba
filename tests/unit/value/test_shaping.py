import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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


def test_naive_difference_takes_the_longer_way_where_that_costs_the_goal():
    """From 0 one step by low progress leads to the goal; the way by high progress takes one step more. A run ends at
    the goal, so with gamma .8 gold pays .8 and .64; the plain difference pays .8 + .8 and .94 + .64 * .06 + .64."""
    phi, gamma = np.array([0.0, 0.0, 0.94, 0.94, 1.0]), 0.8
    after = np.array([[1, 2], [4, 4], [3, 3], [4, 4]])

    def first_values(reward):
        q = np.zeros((5, 2))
        for _ in range(9):
            q[:4] = reward + gamma * q.max(axis=1)[after] * (after != 4)
        return q[0]

    before = np.repeat(phi[:4, None], 2, axis=1)
    gold = first_values(gold_reward(phi[after]))
    naive = first_values(naive_reward(before, phi[after]))
    shaped = first_values(shaped_reward(before, phi[after], gamma))
    assert gold.tolist() == pytest.approx([0.8, 0.64]) and naive.tolist() == pytest.approx([1.6, 1.6184])
    assert gold.argmax() == shaped.argmax() == 0 and naive.argmax() == 1


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_shaping_never_changes_what_is_optimal(seed):
    """Any decision process, any progress of its states, chance included."""
    rng = np.random.default_rng(seed)
    phi = np.append(rng.uniform(0, 1, 5), 1.0)
    chance = rng.dirichlet(np.full(6, 0.3), (6, 3))  # [state, action, next state]

    def values(reward):
        q = np.zeros((6, 3))
        for _ in range(400):
            q = (chance * (reward + GAMMA * q.max(axis=1))).sum(axis=-1)
        return q

    gold = values(np.broadcast_to(gold_reward(phi), chance.shape))
    before, after = np.broadcast_arrays(phi[:, None, None], phi)
    shaped = values(shaped_reward(before, after, GAMMA))
    np.testing.assert_allclose(shaped, gold - phi[:, None], atol=1e-9)


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


def test_shaped_reward_by_hand():
    # .99 * .5 - .2, no gold; .99 * .95 - .5 + 1
    assert shaped_reward(np.array([0.2, 0.5]), np.array([0.5, 0.95])) == pytest.approx([0.295, 1.4405])
    assert naive_reward(np.array([0.2, 0.5]), np.array([0.5, 0.95])) == pytest.approx([0.3, 1.45])


def test_gold_reward_starts_at_one_minus_delta():
    assert gold_reward(np.array([0.94, 0.95, 1.0])).tolist() == [0.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="discount 0"):
        shaped_reward(np.zeros(1), np.zeros(1), gamma=0.0)
