"""Returns and advantages from a batch of experience, time-major: [T] or [T, N]. All results are gradient-free.

`next_value[t]` is the value of the true successor of row t: of the final observation where the episode ended there.
A terminated row has no future and is never bootstrapped. A truncated row is: its successor has a future that the batch does
not show. Where a row is both, it is terminated. The last row of the batch bootstraps like a truncated one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .episodes import continues, episode_sum, linear_recurrence
from .shapes import Scalar, check_same_shape
from .values import td_target


def gae(
    reward: jax.Array,
    value: jax.Array,
    next_value: jax.Array,
    terminated: jax.Array,
    truncated: jax.Array,
    *,
    discount: Scalar,
    gae_lambda: Scalar,
) -> jax.Array:
    """Generalised advantage estimate: the sum of TD errors of the episode from t on, weighted (discount gae_lambda)^k.

    Schulman et al. 2016, arXiv:1506.02438, eq. 16.
    """
    check_same_shape(reward=reward, value=value, next_value=next_value, terminated=terminated, truncated=truncated)
    td_error = td_target(reward, next_value, terminated, discount=discount) - value
    decay = jnp.where(continues(terminated, truncated), discount * gae_lambda, 0)
    return jax.lax.stop_gradient(linear_recurrence(td_error, decay, reverse=True))


def lambda_return(
    reward: jax.Array,
    next_value: jax.Array,
    terminated: jax.Array,
    truncated: jax.Array,
    *,
    discount: Scalar,
    trace_decay: Scalar,
) -> jax.Array:
    """G_t = r_t + discount ((1 - trace_decay) V_{t+1} + trace_decay G_{t+1}): all n-step returns, geometrically weighted.

    Sutton & Barto 2018, eq. 12.18.
    """
    check_same_shape(reward=reward, next_value=next_value, terminated=terminated, truncated=truncated)
    trace = jnp.where(continues(terminated, truncated), trace_decay, 0).astype(reward.dtype)
    term = td_target(reward, (1 - trace) * next_value, terminated, discount=discount)
    return jax.lax.stop_gradient(linear_recurrence(term, discount * trace, reverse=True))


def n_step_return(
    reward: jax.Array,
    next_value: jax.Array,
    terminated: jax.Array,
    truncated: jax.Array,
    *,
    discount: Scalar,
    num_steps: int,
) -> jax.Array:
    """`num_steps` discounted rewards and the value after them; fewer where the episode or the batch ends before.

    Sutton & Barto 2018, eq. 7.1.
    """
    check_same_shape(reward=reward, next_value=next_value, terminated=terminated, truncated=truncated)
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}, but a return holds at least 1 reward: give 1 or more.")
    goes_on = continues(terminated, truncated)

    def one_more_step(_: int, shorter: jax.Array) -> jax.Array:
        successor = jnp.where(goes_on, jnp.roll(shorter, -1, axis=0), next_value)
        return td_target(reward, successor, terminated, discount=discount)

    one_step = td_target(reward, next_value, terminated, discount=discount)
    target: jax.Array = jax.lax.fori_loop(1, min(num_steps, len(reward)), one_more_step, one_step)
    return target


def reward_to_go(
    reward: jax.Array,
    next_value: jax.Array,
    terminated: jax.Array,
    truncated: jax.Array,
    *,
    discount: Scalar,
) -> jax.Array:
    """Monte Carlo return: the rewards of the episode from t on, weighted discount^k.

    A `next_value` of zeros leaves out the bootstrap of truncated rows and of the last one.
    """
    check_same_shape(reward=reward, next_value=next_value, terminated=terminated, truncated=truncated)
    return lambda_return(reward, next_value, terminated, truncated, discount=discount, trace_decay=1.0)


def vtrace(
    reward: jax.Array,
    value: jax.Array,
    next_value: jax.Array,
    ratio: jax.Array,
    terminated: jax.Array,
    truncated: jax.Array,
    *,
    discount: Scalar,
    gae_lambda: Scalar = 1.0,
    clip_rho: Scalar = 1.0,
    clip_c: Scalar = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """(targets of V, advantages) of pi, from experience of another policy with `ratio` pi / mu of the actions taken.

    Espeholt et al. 2018, arXiv:1802.01561, eq. 1 and section 4.2. `clip_rho` decides what V the targets lead to (that of pi without a
    bound), `clip_c` how soon. The ratio is in the advantage already. On-policy these are `lambda_return` and `gae`: `gae_lambda`
    weighs the traces of both, where the paper has it in c alone (remark 2).
    """
    check_same_shape(reward=reward, value=value, next_value=next_value, ratio=ratio, terminated=terminated, truncated=truncated)
    goes_on = continues(terminated, truncated)
    rho, trace = jnp.minimum(ratio, clip_rho), gae_lambda * jnp.minimum(ratio, clip_c)
    td_error = td_target(reward, next_value, terminated, discount=discount) - value
    correction = linear_recurrence(rho * td_error, jnp.where(goes_on, discount * trace, 0), reverse=True)
    later = jnp.where(goes_on, jnp.roll(correction, -1, axis=0), 0)
    advantage = rho * (td_error + discount * gae_lambda * later)
    return jax.lax.stop_gradient(value + correction), jax.lax.stop_gradient(advantage)


def retrace(
    reward: jax.Array,
    q_taken: jax.Array,
    next_value: jax.Array,
    ratio: jax.Array,
    terminated: jax.Array,
    truncated: jax.Array,
    *,
    discount: Scalar,
    gae_lambda: Scalar = 1.0,
) -> jax.Array:
    """Targets of Q for the actions taken, from experience of any policy mu: Q plus its TD errors under traces gae_lambda min(1, pi / mu).

    Munos et al. 2016, arXiv:1606.02647, eq. 4. `next_value` is sum_a pi(a|s') Q(s', a) of the true successor, `ratio` pi / mu of the
    actions taken. A row's own ratio does not weigh its TD error: that action is given.
    """
    check_same_shape(reward=reward, q_taken=q_taken, next_value=next_value, ratio=ratio, terminated=terminated, truncated=truncated)
    td_error = td_target(reward, next_value, terminated, discount=discount) - q_taken
    next_trace = gae_lambda * jnp.roll(jnp.minimum(ratio, 1), -1, axis=0)
    decay = jnp.where(continues(terminated, truncated), discount * next_trace, 0)
    return jax.lax.stop_gradient(q_taken + linear_recurrence(td_error, decay, reverse=True))


def total_return(reward: jax.Array, time: jax.Array, terminated: jax.Array, truncated: jax.Array, *, discount: Scalar) -> jax.Array:
    """Discounted return of the whole episode, sum_t discount^t r_t, at each of its rows.

    `time` counts from the episode's reset. Of an episode that the batch cuts, only the rows within it are summed.
    """
    check_same_shape(reward=reward, time=time, terminated=terminated, truncated=truncated)
    discounted = time_discount(time, discount=discount).astype(reward.dtype) * reward
    return jax.lax.stop_gradient(episode_sum(discounted, terminated, truncated))


def time_discount(time: jax.Array, *, discount: Scalar) -> jax.Array:
    """discount^t, the weight of step t in the gradient of the discounted objective (Sutton & Barto 2018, section 13.3).

    Leaving it out is customary, and the gradient of no objective (Nota & Thomas 2020, arXiv:1906.07073).
    """
    return jnp.power(discount, time)
