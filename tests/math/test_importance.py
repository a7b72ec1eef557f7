"""Importance sampling on the oracle and on discrete distributions (G6)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import TOLERANCE, compiled

from surefoot.math.policy_gradient import (
    check_support,
    clip_weight,
    importance_ratio,
    score_function_loss,
    self_normalise,
    step_importance_weight,
    surrogate_loss,
    trajectory_importance_weight,
)
from surefoot.math.reduce import masked_mean
from surefoot.math.returns import reward_to_go, time_discount, total_return

pytestmark = pytest.mark.x64

MDP = oracle.random_mdp(0)
BATCH = oracle.trajectories(MDP)
FLAGS = (BATCH.terminated, BATCH.truncated)
FIRST_ROW = BATCH.valid & (BATCH.time == 0)
P, Q, F = np.array([0.1, 0.2, 0.7]), np.array([0.5, 0.3, 0.2]), np.array([-1.0, 1.0, 3.0])


def policies():
    """The policy to learn about, and the one that acts."""
    return oracle.random_logits(MDP, 1), oracle.random_logits(MDP, 2)


@jax.jit
def total():
    return total_return(BATCH.reward, BATCH.time, *FLAGS, discount=MDP.discount)


@partial(jax.jit, static_argnums=0)
def weights(kind, theta, behaviour):
    return kind(oracle.log_prob(theta, BATCH), oracle.log_prob(behaviour, BATCH), *FLAGS)


def expected_gradient(loss, theta, behaviour):
    return oracle.moments(oracle.probability(behaviour, BATCH), oracle.gradient_estimates(loss, theta, BATCH.valid))[0]


def test_trajectory_weight_is_ratio_of_trajectory_probabilities_at_every_row():
    theta, behaviour = policies()
    expected = oracle.probability(theta, BATCH) / oracle.probability(behaviour, BATCH)
    weight = weights(trajectory_importance_weight, theta, behaviour)
    np.testing.assert_allclose(weight[BATCH.valid], np.broadcast_to(expected, weight.shape)[BATCH.valid], **TOLERANCE)


def test_weights_start_again_with_each_episode():
    log_prob = np.log([2.0, 3.0, 5.0, 7.0, 11.0, 13.0])
    terminated = np.array([False, True, True, False, False, False])
    truncated = np.array([False, False, False, False, True, False])
    arguments = log_prob, np.zeros(6), terminated, truncated
    np.testing.assert_allclose(step_importance_weight(*arguments), [2, 6, 5, 7, 77, 13], **TOLERANCE)
    np.testing.assert_allclose(trajectory_importance_weight(*arguments), [6, 6, 5, 77, 77, 13], **TOLERANCE)


def test_trajectory_weighted_score_is_unbiased_off_policy():
    theta, behaviour = policies()
    weight = weights(trajectory_importance_weight, theta, behaviour)
    mean = expected_gradient(lambda theta: score_function_loss(oracle.log_prob(theta, BATCH), weight * total()), theta, behaviour)
    np.testing.assert_allclose(mean, oracle.objective_gradient(MDP, theta), **TOLERANCE)


def test_gradient_of_trajectory_weighted_return_is_unbiased_off_policy():
    theta, behaviour = policies()

    def loss(theta):  # the return of an episode counts once
        return FIRST_ROW * surrogate_loss(weights(trajectory_importance_weight, theta, behaviour), total())

    np.testing.assert_allclose(expected_gradient(loss, theta, behaviour), oracle.objective_gradient(MDP, theta), **TOLERANCE)


def test_gradient_of_step_weighted_rewards_is_unbiased_off_policy_and_varies_less():
    theta, behaviour = policies()
    discounted = time_discount(BATCH.time, discount=MDP.discount) * BATCH.reward

    def per_step(theta):
        return surrogate_loss(weights(step_importance_weight, theta, behaviour), discounted)

    def per_trajectory(theta):
        return FIRST_ROW * surrogate_loss(weights(trajectory_importance_weight, theta, behaviour), total())

    prob = oracle.probability(behaviour, BATCH)
    mean, variance = oracle.moments(prob, oracle.gradient_estimates(per_step, theta, BATCH.valid))
    np.testing.assert_allclose(mean, oracle.objective_gradient(MDP, theta), **TOLERANCE)
    assert variance < oracle.moments(prob, oracle.gradient_estimates(per_trajectory, theta, BATCH.valid))[1]


def test_step_weighted_rewards_to_go_are_unbiased_off_policy():
    theta, behaviour = policies()
    reward = weights(step_importance_weight, theta, behaviour) * BATCH.reward
    to_go = reward_to_go(reward, jnp.zeros_like(reward), *FLAGS, discount=MDP.discount)
    credit = time_discount(BATCH.time, discount=MDP.discount) * to_go
    mean = expected_gradient(lambda theta: score_function_loss(oracle.log_prob(theta, BATCH), credit), theta, behaviour)
    np.testing.assert_allclose(mean, oracle.objective_gradient(MDP, theta), **TOLERANCE)


def test_step_weighted_advantage_is_unbiased_and_the_single_ratio_is_not():
    theta, behaviour = policies()
    credit = time_discount(BATCH.time, discount=MDP.discount) * oracle.row_advantages(MDP, theta, BATCH)
    single = importance_ratio(oracle.log_prob(theta, BATCH), oracle.log_prob(behaviour, BATCH))
    cumulative = weights(step_importance_weight, theta, behaviour)

    def gap(weight):
        mean = expected_gradient(lambda theta: score_function_loss(oracle.log_prob(theta, BATCH), weight * credit), theta, behaviour)
        exact = oracle.objective_gradient(MDP, theta)
        return np.max(np.abs(mean - exact)) / np.max(np.abs(exact))

    assert gap(cumulative) < 1e-10
    assert gap(single) > 0.01


def test_ratio_differentiates_the_new_policy_only():
    theta = oracle.random_logits(MDP, 1)

    def everything(new, old):
        log_probs = oracle.log_prob(new, BATCH), oracle.log_prob(old, BATCH)
        weights = trajectory_importance_weight(*log_probs, *FLAGS), step_importance_weight(*log_probs, *FLAGS)
        return jnp.sum(importance_ratio(*log_probs) + sum(weights))

    new, old = compiled(jax.grad(everything, argnums=(0, 1)), theta, theta)
    np.testing.assert_array_equal(old, 0.0)
    assert np.all(np.abs(new[:2]) > 1.0)


def test_ratio_of_policies_with_nothing_in_common_stays_finite_and_flat():
    log_prob = jnp.array([0.0, -500.0, -1.0], jnp.float32)
    old_log_prob = jnp.array([-500.0, 0.0, -2.0], jnp.float32)
    np.testing.assert_allclose(importance_ratio(log_prob, old_log_prob), np.exp([20.0, -20.0, 1.0]), rtol=1e-6)
    gradient = jax.grad(lambda log_prob: jnp.sum(importance_ratio(log_prob, old_log_prob)))(log_prob)
    np.testing.assert_allclose(gradient, [0.0, 0.0, np.e], rtol=1e-6)


def test_variance_of_the_weighted_mean():
    weighted = F * importance_ratio(np.log(P), np.log(Q))
    np.testing.assert_allclose(Q @ weighted, P @ F, **TOLERANCE)
    variance = Q @ weighted**2 - (Q @ weighted) ** 2
    np.testing.assert_allclose(variance, P @ (F**2 * P / Q) - (P @ F) ** 2, **TOLERANCE)


def self_normalised_means(num_draws):
    """The estimate of E_p[F] from each batch of draws of q, and the probability of the batch."""
    index, prob = oracle.independent_draws(Q, num_draws)

    def mean(index):
        weight, mask = importance_ratio(np.log(P), np.log(Q))[index], jnp.ones(num_draws, bool)
        return masked_mean(self_normalise(weight, mask) * jnp.asarray(F)[index], mask)

    return compiled(jax.vmap(mean), index), prob


def test_self_normalised_weights_are_biased_the_less_the_more_draws():
    bias = {}
    for num_draws in (1, 2, 4, 8):
        means, prob = self_normalised_means(num_draws)
        bias[num_draws] = abs(float(prob @ means - P @ F))
    np.testing.assert_allclose(bias[1], abs(Q @ F - P @ F), **TOLERANCE)  # one draw always has weight 1
    assert bias[2] > bias[4] > bias[8] > 0.01


def test_self_normalised_weights_are_consistent():
    draws = np.repeat(np.arange(3), [5, 3, 2])  # in the proportions of q, as infinitely many draws are
    weight = 7.0 * importance_ratio(np.log(P), np.log(Q))[draws]  # and blind to a constant factor
    mask = jnp.ones_like(weight, bool)
    np.testing.assert_allclose(masked_mean(self_normalise(weight, mask) * F[draws], mask), P @ F, **TOLERANCE)


def test_self_normalised_trajectory_weights_count_each_episode_once():
    weight = np.array([[2.0, 3.0], [2.0, 7.0], [2.0, 7.0]])  # two episodes in the second stream
    once = np.array([[True, True], [False, True], [False, False]])
    np.testing.assert_allclose(self_normalise(weight, once), weight / 4.0, **TOLERANCE)


def test_clipped_weights_have_lower_variance_and_a_bias():
    weight = importance_ratio(np.log(P), np.log(Q))
    clipped = clip_weight(weight, maximum=1.5)
    np.testing.assert_allclose(clipped, [0.2, 2 / 3, 1.5], **TOLERANCE)
    assert Q @ (clipped * F) ** 2 - (Q @ (clipped * F)) ** 2 < Q @ (weight * F) ** 2 - (Q @ (weight * F)) ** 2
    assert abs(Q @ (clipped * F) - P @ F) > 0.1


def test_uncovered_action_is_refused():
    p, q = np.array([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]), np.array([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]])
    with np.errstate(divide="ignore"):
        log_p, log_q = np.log(p), np.log(q)
    with pytest.raises(ValueError, match=r"q is 0 in 1 of 6 such places, first at \(1, 1\)"):
        check_support(log_p, log_q)
    check_support(log_q, log_p)
    check_support(log_p, log_p)
