"""The oracle against itself, and the identities that policy optimisation rests on (G1, G2)."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import TOLERANCE

from surefoot.math.policy_gradient import importance_ratio, surrogate_loss
from surefoot.math.returns import time_discount, total_return

pytestmark = pytest.mark.x64

MDP = oracle.random_mdp(0)
BATCH = oracle.trajectories(MDP)


def test_every_trajectory_is_enumerated_once():
    theta = oracle.random_logits(MDP, 1)
    np.testing.assert_allclose(jnp.sum(oracle.probability(theta, BATCH)), 1.0, **TOLERANCE)
    rows = np.stack([np.where(BATCH.valid, column, -1) for column in (BATCH.state, BATCH.action, BATCH.next_state)])
    assert len(np.unique(rows, axis=-1).T) == len(BATCH.environment_prob)


def test_state_distribution_is_that_of_the_trajectories():
    theta = oracle.random_logits(MDP, 1)
    at_state = (BATCH.state[..., None] == np.arange(len(MDP.start))) & BATCH.valid[..., None]
    by_trajectory = jnp.einsum("n,tns->ts", oracle.probability(theta, BATCH), at_state)
    np.testing.assert_allclose(oracle.state_distribution(MDP, theta), by_trajectory, **TOLERANCE)


def test_expected_return_of_trajectories_is_expected_value_of_the_start_state():
    theta = oracle.random_logits(MDP, 1)
    returns = total_return(BATCH.reward, BATCH.time, BATCH.terminated, BATCH.truncated, discount=MDP.discount)[0]
    np.testing.assert_allclose(oracle.probability(theta, BATCH) @ returns, oracle.objective(MDP, theta), **TOLERANCE)


def test_performance_difference_is_expected_advantage_under_the_new_policy():
    old, new = oracle.random_logits(MDP, 1), oracle.random_logits(MDP, 2)
    weighted = time_discount(BATCH.time, discount=MDP.discount) * oracle.row_advantages(MDP, old, BATCH)
    difference = oracle.probability(new, BATCH) @ jnp.sum(jnp.where(BATCH.valid, weighted, 0.0), axis=0)
    np.testing.assert_allclose(difference, oracle.objective(MDP, new) - oracle.objective(MDP, old), **TOLERANCE)


@jax.jit
def surrogate_gap(old, new):
    """True improvement less the surrogate's, which keeps the state distribution of the old policy."""
    ratio = importance_ratio(oracle.log_prob(new, BATCH), oracle.log_prob(old, BATCH))
    weighted = time_discount(BATCH.time, discount=MDP.discount) * oracle.row_advantages(MDP, old, BATCH)
    rows = jnp.where(BATCH.valid, -surrogate_loss(ratio, weighted), 0.0)
    surrogate = oracle.probability(old, BATCH) @ jnp.sum(rows, axis=0)
    return oracle.objective(MDP, new) - oracle.objective(MDP, old) - surrogate


def test_surrogate_gap_vanishes_to_first_order_in_the_step():
    old = oracle.random_logits(MDP, 1)
    np.testing.assert_allclose(surrogate_gap(old, old), 0.0, **TOLERANCE)
    np.testing.assert_allclose(jax.grad(surrogate_gap, argnums=1)(old, old), 0.0, **TOLERANCE)


def test_surrogate_gap_shrinks_faster_than_the_root_of_the_kl():
    old, direction = oracle.random_logits(MDP, 1), oracle.random_logits(MDP, 2)
    steps = 2.0 ** -np.arange(6)
    gap = np.array([abs(surrogate_gap(old, old + step * direction)) for step in steps])
    kl = np.array([oracle.expected_kl(MDP, old, old + step * direction) for step in steps])
    relative = gap / np.sqrt(kl)
    assert np.all(np.diff(relative) < 0)
    assert relative[-1] < 0.1 * relative[0]
