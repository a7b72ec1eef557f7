"""Surrogate losses: their gradient at ratio 1, and the shape of PPO's clip."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import TOLERANCE, compiled

from surefoot.math.divergences import categorical_kl
from surefoot.math.policy_gradient import (
    clipped_surrogate_loss,
    importance_ratio,
    kl_penalised_surrogate_loss,
    score_function_loss,
    surrogate_loss,
)
from surefoot.math.returns import time_discount

pytestmark = pytest.mark.x64

MDP = oracle.random_mdp(0)
BATCH = oracle.trajectories(MDP)


def penalised(ratio, advantage, theta, old):
    kl = categorical_kl(oracle.log_policy(old), oracle.log_policy(theta))[BATCH.state]
    return kl_penalised_surrogate_loss(ratio, advantage, kl, penalty_coef=3.0)


@pytest.mark.parametrize(
    "loss",
    [
        lambda ratio, advantage, theta, old: surrogate_loss(ratio, advantage),
        lambda ratio, advantage, theta, old: clipped_surrogate_loss(ratio, advantage, clip=0.2),
        lambda ratio, advantage, theta, old: clipped_surrogate_loss(ratio, advantage, clip=0.2, dual_clip=3.0),
        penalised,
    ],
    ids=["surrogate", "clipped", "dual-clipped", "penalised"],
)
def test_gradient_at_the_old_policy_is_the_policy_gradient(loss):
    old = oracle.random_logits(MDP, 1)
    advantage = time_discount(BATCH.time, discount=MDP.discount) * oracle.row_advantages(MDP, old, BATCH)

    def rows(theta):
        ratio = importance_ratio(oracle.log_prob(theta, BATCH), oracle.log_prob(old, BATCH))
        return loss(ratio, advantage, theta, old)

    mean, _ = oracle.moments(oracle.probability(old, BATCH), oracle.gradient_estimates(rows, old, BATCH.valid))
    np.testing.assert_allclose(mean, oracle.objective_gradient(MDP, old), **TOLERANCE)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (0.5, 2.0, -1.0, -2.0),  # better than average, less likely than before: pull it back
        (1.1, 2.0, -2.2, -2.0),
        (1.5, 2.0, -2.4, 0.0),  # gone far enough
        (1.5, -2.0, 3.0, 2.0),  # worse than average, more likely than before: push it back
        (0.9, -2.0, 1.8, 2.0),
        (0.5, -2.0, 1.6, 0.0),  # gone far enough
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_clip_is_flat_only_where_the_step_went_the_way_of_the_advantage(ratio, advantage, loss, slope):
    value, gradient = compiled(jax.value_and_grad(partial(clipped_surrogate_loss, clip=0.2)), ratio, advantage)
    np.testing.assert_allclose([value, gradient], [loss, slope], **TOLERANCE)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [(2.9, -2.0, 5.8, 2.0), (5.0, -2.0, 6.0, 0.0), (0.5, -2.0, 1.6, 0.0), (5.0, 2.0, -2.4, 0.0), (0.5, 2.0, -1.0, -2.0)],
)
def test_dual_clip_bounds_the_loss_of_bad_actions_only(ratio, advantage, loss, slope):
    value, gradient = compiled(jax.value_and_grad(partial(clipped_surrogate_loss, clip=0.2, dual_clip=3.0)), ratio, advantage)
    np.testing.assert_allclose([value, gradient], [loss, slope], **TOLERANCE)


def test_dual_clip_of_one_is_refused():
    with pytest.raises(ValueError, match=r"dual_clip is 1\.0"):
        clipped_surrogate_loss(jnp.ones(3), jnp.ones(3), clip=0.2, dual_clip=1.0)


def test_penalty_adds_the_kl():
    loss = kl_penalised_surrogate_loss(jnp.array([1.5]), jnp.array([2.0]), jnp.array([0.1]), penalty_coef=3.0)
    np.testing.assert_allclose(loss, [-2.7], **TOLERANCE)


def test_no_gradient_reaches_the_advantage():
    x = jnp.array([0.3, -0.2])

    def everything(advantage):
        return jnp.sum(
            score_function_loss(x, advantage)
            + surrogate_loss(1 + x, advantage)
            + clipped_surrogate_loss(1 + x, advantage, clip=0.2, dual_clip=2.0)
            + kl_penalised_surrogate_loss(1 + x, advantage, x, penalty_coef=1.0)
        )

    np.testing.assert_array_equal(compiled(jax.grad(everything), jnp.array([1.0, -1.0])), 0.0)
