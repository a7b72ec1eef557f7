"""A walk along a ridge to a cliff, small enough that returns, distributions of states and gradients are sums over everything.

In each step the walker stays where it is or climbs on, slipping back now and then, and is paid the altitude it arrives at. Past the
highest position it falls, which costs much and ends the episode. S positions, A = 2 actions, H steps, no discount.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ...math.divergences import categorical_kl

Array = np.ndarray[Any, Any]

ALTITUDE = np.array([0.0, 1.0, 2.0, 3.0, 4.0, -20.0])  # [S]; the last one is at the foot of the cliff
CLIFF = len(ALTITUDE) - 1
SLIP = 0.2  # probability that climbing leaves the walker where it is
HORIZON = 8
TIMID = np.array([-2.0, 0.0])  # parameters of a policy that climbs about one time in eight, wherever it is


class Walks(NamedTuple):
    """Every walk there is, stream n holding the n-th; the rows after a fall are invalid."""

    position: Array  # [H, N] int
    action: Array  # [H, N] int
    reward: Array  # [H, N]
    terminated: Array  # [H, N] bool
    valid: Array  # [H, N] bool
    time: Array  # [H, N] int
    slip_prob: Array  # [N] what slipping or not gives to the probability; the policy gives the rest


def log_policy(theta: jax.Array) -> jax.Array:
    """[S, A]: the logit of climbing is linear in the position, so that what is learned in one place shows in all."""
    logit = theta[0] + theta[1] * jnp.linspace(0.0, 1.0, len(ALTITUDE))
    return jnp.stack([jax.nn.log_sigmoid(-logit), jax.nn.log_sigmoid(logit)], axis=-1)


def values(theta: jax.Array) -> tuple[jax.Array, jax.Array]:
    """V [H, S] and Q [H, S, A] by dynamic programming; row t has H - t steps to go."""
    policy, next_value, steps = jnp.exp(log_policy(theta)), jnp.zeros(len(ALTITUDE)), []
    for _ in range(HORIZON):
        arriving = ALTITUDE + next_value
        action_value = jnp.stack([arriving, SLIP * arriving + (1 - SLIP) * jnp.roll(arriving, -1)], axis=-1)
        next_value = jnp.sum(policy * action_value, axis=-1).at[CLIFF].set(0.0)
        steps.append((next_value, action_value))
    value, action_value = zip(*reversed(steps), strict=True)
    return jnp.stack(value), jnp.stack(action_value)


def expected_return(theta: jax.Array) -> jax.Array:
    """J, from the lowest position."""
    return values(theta)[0][0, 0]


def state_distribution(theta: jax.Array) -> jax.Array:
    """[H, S] probability of taking a step at a time in a position; rows sum to the probability of not having fallen."""
    climbing = (1 - SLIP) * jnp.exp(log_policy(theta)[:, 1])
    distribution = [jnp.zeros(len(ALTITUDE)).at[0].set(1.0)]
    for _ in range(HORIZON - 1):
        arriving = jnp.roll(distribution[-1] * climbing, 1) + distribution[-1] * (1 - climbing)
        distribution.append(arriving.at[CLIFF].set(0.0))
    return jnp.stack(distribution)


def expected_kl(old: jax.Array, new: jax.Array) -> jax.Array:
    """Mean over the steps that `old` takes of KL(old || new)."""
    distribution = state_distribution(old)
    return jnp.sum(distribution @ categorical_kl(log_policy(old), log_policy(new))) / jnp.sum(distribution)


def walks() -> Walks:
    """Enumerate them: in each step the walker stays, slips or climbs."""
    outcome = np.indices((3,) * HORIZON).reshape(HORIZON, -1)
    position = np.cumsum(outcome == 2, axis=0) - (outcome == 2)
    valid = position < CLIFF
    once = (valid | (outcome == 0)).all(axis=0)  # of the walks that differ only after the fall, one
    outcome, position, valid = outcome[:, once], position[:, once], valid[:, once]
    arrival = position + (outcome == 2)
    time = np.indices(position.shape)[0]
    return Walks(
        position=np.where(valid, position, 0),
        action=(outcome > 0).astype(int),
        reward=np.where(valid, ALTITUDE[np.minimum(arrival, CLIFF)], 0.0),
        terminated=valid & ((arrival == CLIFF) | (time == HORIZON - 1)),
        valid=valid,
        time=time,
        slip_prob=np.prod(np.choose(outcome, [1.0, SLIP, 1 - SLIP]), axis=0),
    )
