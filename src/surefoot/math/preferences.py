"""Learning from judgements of whole answers: comparisons, a score at the end of a sequence, and answers that share a prompt."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .reduce import STANDARDISE_EPSILON
from .shapes import Scalar, check_same_shape


def bradley_terry_loss(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
    """-log sigmoid(chosen - rejected), the negative log-likelihood of a comparison under the scores of both answers.

    Bradley & Terry 1952; Christiano et al. 2017, arXiv:1706.03741, eq. 1.
    """
    check_same_shape(chosen=chosen, rejected=rejected)
    return jax.nn.softplus(rejected - chosen)


def kl_penalised_reward(score: jax.Array, kl: jax.Array, last: jax.Array, *, penalty_coef: Scalar) -> jax.Array:
    """[T, N] reward of each token: -penalty_coef kl, and at the `last` token of an answer its score too. Gradient-free.

    Ziegler et al. 2019, arXiv:1909.08593, eq. 2. `score` is one number for each answer at all of its rows, `kl` the estimate of the
    token's divergence from the reference (k1: log pi / ref, whose sum over the answer is that of the sequence).
    """
    check_same_shape(score=score, kl=kl, last=last)
    return jax.lax.stop_gradient(jnp.where(last, score, 0) - penalty_coef * kl)


def group_mean(reward: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(mean over the last axis of the rewards [..., G] that the mask keeps, their number), both [..., 1]; 0 where there is none."""
    check_same_shape(reward=reward, mask=mask)
    count = jnp.sum(mask, axis=-1, keepdims=True).astype(reward.dtype)
    return jnp.sum(reward, axis=-1, keepdims=True, where=mask) / jnp.maximum(count, 1), count


def leave_one_out_advantage(reward: jax.Array, mask: jax.Array) -> jax.Array:
    """Each reward [..., G] less the mean of the others of its group, answers to one prompt; 0 outside the mask and for one alone.

    Kool, van Hoof & Welling 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!"; Ahmadian et al. 2024, arXiv:2402.14740, eq. 8.
    """
    mean, count = group_mean(reward, mask)
    # r_i - sum_{j != i} r_j / (n - 1) = n / (n - 1) (r_i - mean)
    factor = jnp.where(count > 1, count / jnp.maximum(count - 1, 1), 0)
    return jax.lax.stop_gradient(jnp.where(mask, factor * (reward - mean), 0))


def group_relative_advantage(reward: jax.Array, mask: jax.Array) -> jax.Array:
    """Each reward [..., G] less the mean of its group, over the group's standard deviation; 0 outside the mask, and where all are equal.

    GRPO: Shao et al. 2024, arXiv:2402.03300, section 4.1.2.
    """
    mean, count = group_mean(reward, mask)
    centred = jnp.where(mask, reward - mean, 0)
    deviation = jnp.sqrt(jnp.sum(jnp.square(centred), axis=-1, keepdims=True) / jnp.maximum(count, 1))
    return jax.lax.stop_gradient(centred / (deviation + STANDARDISE_EPSILON))
