"""Scores of whole answers: comparisons, rewards of tokens, and baselines from the other answers to a prompt."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import TOLERANCE, compiled

from surefoot.math.policy_gradient import score_function_loss
from surefoot.math.preferences import (
    bradley_terry_loss,
    group_mean,
    group_relative_advantage,
    kl_penalised_reward,
    leave_one_out_advantage,
)
from surefoot.math.returns import gae

pytestmark = pytest.mark.x64

REWARD = np.array([[1.0, 4.0, 2.0, 0.5], [3.0, 9.0, -1.0, 7.0], [5.0, 6.0, 7.0, 8.0], [2.0, 2.0, 2.0, 9.0]])
MASK = np.array([[True] * 4, [True, False, True, False], [False, False, True, False], [True, True, True, False]])


def test_comparisons_are_judged_by_the_probability_of_what_was_chosen():
    chosen, rejected = np.array([1.0, -2.0, 0.3]), np.array([0.5, 1.0, 0.3])
    probability = 1 / (1 + np.exp(rejected - chosen))
    loss, gradient = compiled(jax.vmap(jax.value_and_grad(bradley_terry_loss)), chosen, rejected)
    np.testing.assert_allclose(loss, -np.log(probability), **TOLERANCE)
    np.testing.assert_allclose(gradient, probability - 1, **TOLERANCE)


def test_comparisons_of_wild_scores_stay_finite():
    np.testing.assert_allclose(bradley_terry_loss(jnp.float32([-900.0, 900.0]), jnp.float32([900.0, -900.0])), [1800.0, 0.0])


def test_the_advantage_of_each_token_is_the_score_less_the_divergence_to_go():
    rng, coefficient = np.random.default_rng(0), 0.3
    lengths = np.array([4, 1, 3])
    time = np.arange(4)[:, None]
    valid, last = time < lengths, time == lengths - 1
    kl, score = np.where(valid, rng.normal(size=(4, 3)), 0.0), np.array([1.0, -2.0, 0.5])
    reward = kl_penalised_reward(np.broadcast_to(score, (4, 3)), kl, last, penalty_coef=coefficient)
    zero, never = np.zeros((4, 3)), np.zeros((4, 3), bool)
    advantage = compiled(gae, reward, zero, zero, last, never, discount=1.0, gae_lambda=1.0)
    to_go = np.cumsum(kl[::-1], axis=0)[::-1]
    np.testing.assert_allclose(np.asarray(advantage)[valid], (score - coefficient * to_go)[valid], **TOLERANCE)


def test_no_gradient_flows_through_a_reward():
    gradient = jax.grad(lambda kl: jnp.sum(kl_penalised_reward(jnp.ones(2), kl, jnp.array([False, True]), penalty_coef=1.0)))(jnp.ones(2))
    np.testing.assert_array_equal(gradient, 0.0)


def test_baselines_are_of_the_others_that_were_scored():
    left_out, relative = (np.asarray(compiled(f, REWARD, MASK)) for f in (leave_one_out_advantage, group_relative_advantage))
    mean, count = compiled(group_mean, REWARD, MASK)
    for g, (rewards, mask) in enumerate(zip(REWARD, MASK, strict=True)):
        scored = rewards[mask]
        assert (mean[g, 0], count[g, 0]) == (pytest.approx(scored.mean()), len(scored))
        for i, reward in enumerate(rewards):
            others = np.delete(rewards, i)[np.delete(mask, i)]
            alone = not mask[i] or len(others) == 0
            np.testing.assert_allclose(left_out[g, i], 0.0 if alone else reward - others.mean(), **TOLERANCE)
            spread = scored.std()
            np.testing.assert_allclose(relative[g, i], 0.0 if alone or spread == 0 else (reward - scored.mean()) / spread, rtol=1e-6)


def test_a_group_of_one_has_no_baseline():
    for advantage in (leave_one_out_advantage, group_relative_advantage):
        np.testing.assert_array_equal(advantage(jnp.array([[3.0], [5.0]]), jnp.array([[True], [True]])), 0.0)


def test_a_group_without_any_score_is_nothing():
    for advantage in (leave_one_out_advantage, group_relative_advantage):
        np.testing.assert_array_equal(advantage(jnp.array([[3.0, 5.0]]), jnp.array([[False, False]])), 0.0)


def test_the_policy_gradient_is_unbiased_with_the_others_as_a_baseline_and_biased_with_their_deviation():
    """Every group of three answers of one token, each with its probability."""
    logits, reward = jnp.asarray([0.4, -0.3, 0.9]), np.array([1.0, -0.5, 2.0])
    index, prob = oracle.independent_draws(jax.nn.softmax(logits), 3)

    def expected(advantage_of):
        advantage = advantage_of(jnp.asarray(reward[index]), jnp.ones(index.shape, bool))

        def loss(logits):
            log_prob = jax.nn.log_softmax(logits)[index]
            return prob @ jnp.mean(score_function_loss(log_prob, advantage), axis=-1)

        return -jax.jit(jax.grad(loss))(logits)

    truth = jax.grad(lambda logits: jax.nn.softmax(logits) @ reward)(logits)
    np.testing.assert_allclose(expected(leave_one_out_advantage), truth, **TOLERANCE)
    assert np.abs(expected(group_relative_advantage) - truth).max() > 0.01
