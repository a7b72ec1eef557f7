"""Losses whose gradient is a policy gradient, and the importance weights of data from another policy.

Losses are elementwise and minimised; the caller reduces. No gradient flows through an advantage.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .divergences import MAX_LOG_RATIO
from .episodes import episode_cumsum, episode_sum
from .reduce import masked_mean
from .shapes import Scalar, check_same_shape


def score_function_loss(log_prob: jax.Array, advantage: jax.Array) -> jax.Array:
    """-advantage log pi(a|s). Williams 1992; with a return less a baseline, REINFORCE."""
    check_same_shape(log_prob=log_prob, advantage=advantage)
    return -jax.lax.stop_gradient(advantage) * log_prob


def expected_control_variate(log_probs: jax.Array, control_variate: jax.Array) -> jax.Array:
    """sum_a pi(a|s) c(s, a) over the last axis, [..., A] -> [...]; its gradient, sum_a grad pi(a|s) c(s, a), is the analytic correction.

    Gu et al. 2017, arXiv:1611.02247, eqs. 7 and 8, for categorical policies, where the sum needs no linearised c. No gradient reaches c,
    and an action with pi = 0, as a masked one, adds nothing.
    """
    check_same_shape(log_probs=log_probs, control_variate=control_variate)
    p = jnp.exp(log_probs)
    return jnp.sum(p * jnp.where(p > 0, jax.lax.stop_gradient(control_variate), 0), axis=-1)


def linear_control_variate(action: jax.Array, mean: jax.Array, slope: jax.Array) -> jax.Array:
    """slope . (a - m) over the last axis, [..., A] -> [...]: Q(s, a) - Q(s, m) to first order, `slope` the gradient of Q at the mean m.

    Gu et al. 2017, arXiv:1611.02247, section 3.1. Of the mean of another policy it is the expectation under that one, whose gradient is
    the analytic correction. None reaches `mean` and `slope`.
    """
    check_same_shape(action=action, mean=mean, slope=slope)
    return jnp.sum(jax.lax.stop_gradient(slope) * (action - jax.lax.stop_gradient(mean)), axis=-1)


def action_dependent_advantage(advantage: jax.Array, control_variate: jax.Array, expected_control_variate: jax.Array) -> jax.Array:
    """advantage - (c(s, a) - E_pi c(s, .)), for c of the action taken: what the control variate leaves to the score. Gradient-free.

    Gu et al. 2017, arXiv:1611.02247, eq. 8; Liu et al. 2018, arXiv:1710.11198, for other policies. Alone it is biased; at each row
    score_function_loss(log_prob, this) - expected_control_variate is unbiased for any c that was not fitted to the sampled return.
    """
    check_same_shape(advantage=advantage, control_variate=control_variate, expected_control_variate=expected_control_variate)
    return jax.lax.stop_gradient(advantage - control_variate + expected_control_variate)


def importance_ratio(log_prob: jax.Array, old_log_prob: jax.Array) -> jax.Array:
    """pi(a|s) / pi_old(a|s), held within e^-20 and e^20. The old policy is data: no gradient reaches it."""
    check_same_shape(log_prob=log_prob, old_log_prob=old_log_prob)
    return _weight(log_prob - jax.lax.stop_gradient(old_log_prob))


def trajectory_importance_weight(log_prob: jax.Array, old_log_prob: jax.Array, terminated: jax.Array, truncated: jax.Array) -> jax.Array:
    """Product of the ratios of a whole episode, at each of its rows: the weight of its return. [T, ...].

    A row in which no action was taken must have equal log-probabilities.
    """
    check_same_shape(log_prob=log_prob, old_log_prob=old_log_prob, terminated=terminated, truncated=truncated)
    return _weight(episode_sum(log_prob - jax.lax.stop_gradient(old_log_prob), terminated, truncated))


def step_importance_weight(log_prob: jax.Array, old_log_prob: jax.Array, terminated: jax.Array, truncated: jax.Array) -> jax.Array:
    """Product of the ratios of an episode up to each row: the weight of the row's reward. [T, ...].

    Precup, Sutton & Singh 2000, "Eligibility Traces for Off-Policy Policy Evaluation", section 3. A row in which no action was
    taken must have equal log-probabilities.
    """
    check_same_shape(log_prob=log_prob, old_log_prob=old_log_prob, terminated=terminated, truncated=truncated)
    return _weight(episode_cumsum(log_prob - jax.lax.stop_gradient(old_log_prob), terminated, truncated))


def _weight(log_ratio: jax.Array) -> jax.Array:
    return jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def self_normalise(weight: jax.Array, mask: jax.Array) -> jax.Array:
    """Weights divided by their mean over the mask: less variance, for a bias that vanishes with the number of samples.

    The mask says what counts as a sample, and all weights are divided. Where an episode's rows share one weight, mark one of them.
    """
    check_same_shape(weight=weight, mask=mask)
    return weight / masked_mean(weight, mask)


def clip_weight(weight: jax.Array, *, maximum: Scalar) -> jax.Array:
    """Weights of at most `maximum`: bounded variance, for a bias. Ionides 2008, "Truncated Importance Sampling"."""
    return jnp.minimum(weight, maximum)


def check_support(log_prob_p: jax.Array, log_prob_q: jax.Array) -> None:
    """Raise ValueError where q = 0 < p: samples of q never show what p does there, and no weight can make up for it.

    For concrete arrays, outside of compiled programs. All entries of the distributions are needed, [..., A], not samples.
    """
    check_same_shape(log_prob_p=log_prob_p, log_prob_q=log_prob_q)
    uncovered = (jnp.exp(log_prob_p) > 0) & (jnp.exp(log_prob_q) == 0)
    if uncovered.any():
        first = tuple(int(index) for index in jnp.argwhere(uncovered)[0])
        raise ValueError(
            f"importance weights p/q need q > 0 wherever p > 0, but q is 0 in {int(uncovered.sum())} of {uncovered.size} such places, "
            f"first at {first}. Sample from a q that covers p: the same action mask for both, or a share of p or of the uniform in q."
        )


def surrogate_loss(ratio: jax.Array, advantage: jax.Array) -> jax.Array:
    """-ratio advantage; at ratio 1 its gradient is the policy gradient. Schulman et al. 2015, arXiv:1502.05477, eq. 14."""
    check_same_shape(ratio=ratio, advantage=advantage)
    return -ratio * jax.lax.stop_gradient(advantage)


def clipped_surrogate_loss(ratio: jax.Array, advantage: jax.Array, *, clip: Scalar, dual_clip: float | None = None) -> jax.Array:
    """PPO's clipped surrogate: flat once the ratio has left [1 - clip, 1 + clip] in the direction that the advantage favours.

    Schulman et al. 2017, arXiv:1707.06347, eq. 7. `dual_clip` > 1 bounds the loss of a negative advantage by that multiple of it,
    flat beyond: Ye et al. 2020, arXiv:1912.09729, eq. 5.
    """
    check_same_shape(ratio=ratio, advantage=advantage)
    advantage = jax.lax.stop_gradient(advantage)
    objective = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage)
    if dual_clip is not None:
        if dual_clip <= 1:
            raise ValueError(f"dual_clip is {dual_clip}; at 1 or below nothing is learned from bad actions: give more than 1, or None.")
        objective = jnp.where(advantage < 0, jnp.maximum(objective, dual_clip * advantage), objective)
    return -objective


def kl_penalised_surrogate_loss(ratio: jax.Array, advantage: jax.Array, kl: jax.Array, *, penalty_coef: Scalar) -> jax.Array:
    """-ratio advantage + penalty_coef KL. Schulman et al. 2017, arXiv:1707.06347, eq. 8."""
    check_same_shape(ratio=ratio, advantage=advantage, kl=kl)
    return surrogate_loss(ratio, advantage) + penalty_coef * kl
