"""Rows of unfinished episodes wait in the learner's state until their episode has ended, for methods that need whole ones."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .spaces import action_size, zero_actions, zeros
from .types import EnvironmentSpec, Observation, Rollout


class Rows(NamedTuple):
    """What is kept of each row, [T, N, ...]."""

    obs: Observation
    action: jax.Array
    action_mask: jax.Array | None
    reward: jax.Array
    old_log_prob: jax.Array  # of the policy that acted; 0 in rows that are not valid
    value: jax.Array  # V(s) of the critic when the row arrived: it has not been fitted to the row's own episode yet
    terminated: jax.Array
    truncated: jax.Array
    valid: jax.Array
    time: jax.Array


def empty_window(spec: EnvironmentSpec, length: int) -> Rows:
    """`length` rows [length, N, ...] before the first batch, none of them valid."""
    shape = length, spec.num_envs
    return Rows(
        obs=jax.tree.map(jnp.asarray, zeros(spec.observation_space, *shape)),
        action=zero_actions(spec.action_space, *shape),
        action_mask=jnp.zeros((*shape, action_size(spec.action_space)), bool) if spec.has_action_mask else None,
        reward=jnp.zeros(shape),
        old_log_prob=jnp.zeros(shape),
        value=jnp.zeros(shape),
        terminated=jnp.zeros(shape, bool),
        truncated=jnp.zeros(shape, bool),
        valid=jnp.zeros(shape, bool),
        time=jnp.zeros(shape, jnp.int32),
    )


def rows_of(rollout: Rollout, reward: jax.Array, old_log_prob: jax.Array, value: jax.Array) -> Rows:
    """The rows of a rollout, with `reward` [T, N] as it is to be credited."""
    given = {name: getattr(rollout, name) for name in Rows._fields if name in Rollout._fields and name != "reward"}
    return Rows(reward=reward, old_log_prob=jnp.where(rollout.valid, old_log_prob, 0), value=value, **given)


def join(window: Rows, rows: Rows) -> tuple[Rows, Rows, jax.Array]:
    """The window [W, N, ...] before the new rows [T, N, ...]; the window to keep, their last W; and which rows are complete.

    Complete are the rows of episodes that end among the new rows and whose every row is here.
    """
    length = len(window.time)
    # A stream that begins anew, as where a run goes on but its environment cannot, left the episode before it without an end.
    is_last = jnp.arange(length)[:, None] == length - 1
    window = window._replace(truncated=window.truncated | (is_last & (rows.time[0] == 0)))
    joined: Rows = jax.tree.map(lambda old, new: jnp.concatenate([old, new.astype(old.dtype)]), window, rows)
    kept = jax.tree.map(lambda x: x[x.shape[0] - length :], joined)
    ended = (joined.terminated | joined.truncated) & joined.valid
    index = jnp.arange(len(ended))[:, None]
    end = jax.lax.cummin(jnp.where(ended, index, len(ended)), axis=0, reverse=True)  # of each row's episode
    complete = joined.valid & (end >= length) & (end < len(ended)) & (index >= joined.time)
    return joined, kept, complete


def mean_of_others(x: jax.Array, own_sum: jax.Array, own_count: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of x over the masked rows of all other episodes, at every row; 0 where there is no other episode."""
    count = jnp.sum(mask) - own_count
    return jnp.where(count > 0, (jnp.sum(x, where=mask) - own_sum) / jnp.maximum(count, 1), 0)
