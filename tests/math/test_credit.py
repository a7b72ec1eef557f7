"""Forms of the policy gradient on the oracle: which are unbiased, and how far each varies (G3, G4, G5)."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import TOLERANCE, compiled

from surefoot.math.policy_gradient import score_function_loss
from surefoot.math.reduce import leave_one_out_mean, masked_mean
from surefoot.math.returns import gae, reward_to_go, time_discount, total_return

pytestmark = pytest.mark.x64

MDP = oracle.random_mdp(0)
BATCH = oracle.trajectories(MDP)
SMALL = oracle.random_mdp(1, num_states=2, horizon=2, num_terminal=0)
SMALL_BATCH = oracle.trajectories(SMALL)


@partial(jax.jit, static_argnums=0)
def total(mdp, batch):
    return total_return(batch.reward, batch.time, batch.terminated, batch.truncated, discount=mdp.discount)


def to_go(mdp, batch):
    return reward_to_go(batch.reward, jnp.zeros_like(batch.reward), batch.terminated, batch.truncated, discount=mdp.discount)


@jax.jit
def moments(batch, theta, advantage):
    estimates = oracle.gradient_estimates(lambda theta: score_function_loss(oracle.log_prob(theta, batch), advantage), theta, batch.valid)
    return oracle.moments(oracle.probability(theta, batch), estimates)


@partial(jax.jit, static_argnums=0)
def ladder(mdp, batch, theta):
    """Weights of the score, each of which should give the gradient of the discounted objective."""
    value, next_value = oracle.row_values(oracle.values(mdp, theta)[0], batch)
    weight = time_discount(batch.time, discount=mdp.discount)
    return {
        "total return": total(mdp, batch),
        "reward to go": weight * to_go(mdp, batch),
        "less a constant": total(mdp, batch) - 1.7,
        "less the state value": weight * (to_go(mdp, batch) - value),
        "gae": weight * gae(batch.reward, value, next_value, batch.terminated, batch.truncated, discount=mdp.discount, gae_lambda=0.7),
        "exact advantage": weight * oracle.row_advantages(mdp, theta, batch),
    }


@pytest.mark.parametrize("credit", ["total return", "reward to go", "less a constant", "less the state value", "gae", "exact advantage"])
def test_estimator_is_unbiased(credit):
    theta = oracle.random_logits(MDP, 1)
    mean, _ = moments(BATCH, theta, ladder(MDP, BATCH, theta)[credit])
    np.testing.assert_allclose(mean, oracle.objective_gradient(MDP, theta), **TOLERANCE)


def test_variance_falls_from_rung_to_rung():
    theta = oracle.random_logits(MDP, 1)
    credits = ladder(MDP, BATCH, theta)
    rungs = ["total return", "reward to go", "less the state value", "gae", "exact advantage"]
    variances = [float(moments(BATCH, theta, credits[rung])[1]) for rung in rungs]
    assert all(below < above for above, below in pairwise(variances)), variances


def test_gradient_without_the_discount_of_time_is_biased():
    theta = oracle.random_logits(MDP, 1)
    mean, _ = moments(BATCH, theta, to_go(MDP, BATCH))
    exact = oracle.objective_gradient(MDP, theta)
    assert np.max(np.abs(mean - exact)) > 0.03 * np.max(np.abs(exact))


def test_both_discounts_agree_where_nothing_is_discounted():
    theta, undiscounted = oracle.random_logits(MDP, 1), replace(MDP, discount=1.0)
    mean, _ = moments(BATCH, theta, to_go(undiscounted, BATCH))
    np.testing.assert_allclose(mean, oracle.objective_gradient(undiscounted, theta), **TOLERANCE)


@jax.jit
def batch_gradient(theta, index, advantage):
    """[B, D] estimates from batches of trajectories, `advantage` [B, n] weighing the whole trajectory's log-probability."""

    def ascent(theta):
        log_prob = jnp.sum(oracle.log_prob(theta, SMALL_BATCH), axis=0)[index]
        return -jnp.mean(score_function_loss(log_prob, advantage), axis=-1)

    return jax.jacfwd(ascent)(theta).reshape(len(index), -1)


def three_draws(theta):
    prob = oracle.probability(theta, SMALL_BATCH)
    index, batch_prob = oracle.independent_draws(prob, 3)
    return index, batch_prob, np.asarray(total(SMALL, SMALL_BATCH)[0])[index]


def test_leave_one_out_baseline_is_unbiased_and_lowers_the_variance():
    theta = oracle.random_logits(SMALL, 1)
    index, prob, returns = three_draws(theta)
    baseline = compiled(jax.vmap(leave_one_out_mean), returns, np.ones_like(returns, bool))
    mean, variance = oracle.moments(prob, batch_gradient(theta, index, returns - baseline))
    np.testing.assert_allclose(mean, oracle.objective_gradient(SMALL, theta), **TOLERANCE)
    assert variance < 0.5 * oracle.moments(prob, batch_gradient(theta, index, returns))[1]


def test_mean_of_earlier_batch_is_unbiased():
    theta = oracle.random_logits(SMALL, 1)
    index, prob, returns = three_draws(theta)
    earlier, now = returns[:, :2], returns[:, 2:]
    baseline = compiled(jax.vmap(masked_mean), earlier, np.ones_like(earlier, bool))[:, None]
    mean, _ = oracle.moments(prob, batch_gradient(theta, index[:, 2:], now - baseline))
    np.testing.assert_allclose(mean, oracle.objective_gradient(SMALL, theta), **TOLERANCE)


def test_mean_of_the_same_batch_shrinks_the_gradient_by_one_part_in_its_size():
    theta = oracle.random_logits(SMALL, 1)
    index, prob, returns = three_draws(theta)
    baseline = compiled(jax.vmap(masked_mean), returns, np.ones_like(returns, bool))[:, None]
    mean, _ = oracle.moments(prob, batch_gradient(theta, index, returns - baseline))
    np.testing.assert_allclose(mean, 2 / 3 * oracle.objective_gradient(SMALL, theta), **TOLERANCE)
