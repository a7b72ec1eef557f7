"""The step audit: how far did the step go, and did it deliver. The same numbers for every policy-based method."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .distributions import Distribution
from .estimates import Estimates
from .math.policy_gradient import importance_ratio
from .math.reduce import effective_sample_size, explained_variance, masked_mean
from .math.returns import time_discount
from .normalise import ReturnScale, update_normaliser
from .policies import StochasticPolicy, distributions_of, inputs_of
from .types import Rollout


def step_audit(old: Distribution, new: Distribution, rollout: Rollout, advantage: jax.Array, *, discount: float) -> dict[str, jax.Array]:
    """Distance between the policies before and after an iteration, on the batch [T, N] that the step was made from.

    Args:
        old, new: distributions on the raw observations, with everything that the iteration changed, the normaliser included.
        advantage: [T, N] in reward units, not normalised.

    Returns:
        Exact mean KL(old || new); smallest and largest ratio; effective sample size as a fraction of the batch; entropy of
        the new policy; and the surrogate's promise (Kakade & Langford 2002, eq. 4.1): the mean over the batch's episodes of
        sum_t gamma^t (ratio_t - 1) A_t, with its standard error. It is NaN where no episode began in the batch.
    """
    valid = rollout.valid
    ratio = importance_ratio(new.log_prob(rollout.action), old.log_prob(rollout.action))
    promise = time_discount(rollout.time, discount=discount) * (ratio - 1.0) * advantage
    improvement, error = mean_per_episode(jnp.where(valid, promise, 0.0), begins=valid & (rollout.time == 0))
    return {
        "kl": masked_mean(old.kl_to(new), valid),
        "ratio_min": jnp.min(jnp.where(valid, ratio, jnp.inf)),
        "ratio_max": jnp.max(jnp.where(valid, ratio, -jnp.inf)),
        "effective_sample_size": effective_sample_size(ratio, valid) / jnp.sum(valid),
        "entropy": masked_mean(new.entropy(), valid),
        "predicted_improvement": improvement,
        "predicted_improvement_error": error,
    }


def conclude(
    config: Any, policy: StochasticPolicy, return_scale: ReturnScale | None, rollout: Rollout, before: Estimates
) -> tuple[StochasticPolicy, ReturnScale | None, dict[str, jax.Array]]:
    """End an iteration: take the batch into the statistics that were frozen during it, and audit the step with them in place.

    `policy` has the new actor and the old normaliser.
    """
    policy = policy._replace(normaliser=update_normaliser(policy.normaliser, rollout.obs, rollout.valid))
    if return_scale is not None:
        ended = rollout.terminated | rollout.truncated
        return_scale = return_scale.update(rollout.reward, ended, rollout.valid, discount=config.gamma)
    new = distributions_of(policy.actor, inputs_of(policy, rollout))
    audit = step_audit(before.old, new, rollout, before.advantage * before.scale, discount=config.gamma)
    audit["explained_variance"] = explained_variance(before.value, before.value_target, rollout.valid)
    return policy, return_scale, audit


def mean_per_episode(x: jax.Array, *, begins: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum of x [T, N] over the number of episodes that begin in the batch, and its standard error; NaN for none, and for one.

    A batch cuts episodes at both ends. Dividing the sum by the episodes that begin, rather than by all that appear, leaves
    the ratio unbiased in the long run; the error is that of a ratio of sums over the pieces
    (Cochran 1977, eq. 2.39, with the number of those episodes for n).
    """
    num_steps, num_streams = x.shape
    piece = jnp.cumsum(begins, axis=0) + jnp.arange(num_streams) * (num_steps + 1)
    sums, counts = (
        jax.ops.segment_sum(values.ravel(), piece.ravel(), num_segments=num_streams * (num_steps + 1))
        for values in (x, begins.astype(x.dtype))
    )
    episodes = jnp.sum(counts)
    mean = jnp.where(episodes > 0, jnp.sum(sums) / episodes, jnp.nan)
    spread = jnp.sqrt(jnp.sum((sums - mean * counts) ** 2) * episodes / (episodes - 1.0))
    return mean, jnp.where(episodes > 1, spread / episodes, jnp.nan)
