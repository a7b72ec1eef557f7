"""Running means and variances as pytrees: of observations inside the policy, of returns inside the learner.

Statistics are frozen while an iteration acts and learns, and updated once after it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from .math.reduce import masked_mean, masked_variance
from .spaces import map_leaves
from .types import Observation, PyTree

EPSILON = 1e-8  # keeps a constant input finite; far below any variance that matters
CLIP = 10.0  # in standard deviations, as the field's reference implementations have it


class Moments(NamedTuple):
    """Mean and variance of everything seen."""

    mean: jax.Array
    variance: jax.Array
    count: jax.Array  # [] float32: beyond 2^24 samples it only weighs, so rounding does not matter

    @classmethod
    def start(cls, shape: tuple[int, ...]) -> Moments:
        """Before the first sample: the identity."""
        return cls(jnp.zeros(shape), jnp.ones(shape), jnp.zeros(()))

    def update(self, x: jax.Array, valid: jax.Array) -> Moments:
        """Take in x [T, N, ...] where valid [T, N] (Chan, Golub & LeVeque 1979: parallel variance)."""
        flat, mask = x.reshape(valid.size, -1).astype(jnp.float32), valid.ravel()
        mean = jax.vmap(masked_mean, (1, None))(flat, mask).reshape(self.mean.shape)
        variance = jax.vmap(masked_variance, (1, None))(flat, mask).reshape(self.mean.shape)
        count = jnp.sum(mask).astype(jnp.float32)
        weight = count / jnp.maximum(self.count + count, 1.0)
        delta = mean - self.mean
        return Moments(
            self.mean + weight * delta,
            (1.0 - weight) * self.variance + weight * variance + weight * (1.0 - weight) * delta**2,
            self.count + count,
        )


Normaliser = PyTree  # Moments at every float leaf of the observation, None elsewhere; None as a whole where it is off


def observation_normaliser(space: gymnasium.Space[Any]) -> Normaliser:
    """Moments for every float leaf of `space`; bytes and categories are encoded by the network instead."""
    return map_leaves(lambda leaf: Moments.start(leaf.shape) if np.issubdtype(leaf.dtype, np.floating) else None, space)


def _leaf(node: Any) -> bool:
    return node is None or isinstance(node, Moments)


def normalise(normaliser: Normaliser, obs: Observation) -> Observation:
    """Observations with mean 0 and variance 1, clipped to 10 standard deviations; unchanged where there are no statistics."""
    if normaliser is None:
        return obs

    def leaf(moments: Moments | None, x: jax.Array) -> jax.Array:
        if moments is None:
            return x
        return jnp.clip((x - moments.mean) * jax.lax.rsqrt(moments.variance + EPSILON), -CLIP, CLIP)

    return jax.tree.map(leaf, normaliser, obs, is_leaf=_leaf)


def update_normaliser(normaliser: Normaliser, obs: Observation, valid: jax.Array) -> Normaliser:
    """Take in the observations [T, N, ...] of the valid rows."""
    if normaliser is None:
        return None
    return jax.tree.map(lambda m, x: None if m is None else m.update(x, valid), normaliser, obs, is_leaf=_leaf)


class ReturnScale(NamedTuple):
    """Rewards are divided by the running standard deviation of the discounted return, so that values are of order one."""

    moments: Moments
    running_return: jax.Array  # [N]

    @classmethod
    def start(cls, num_envs: int) -> ReturnScale:
        return cls(Moments.start(()), jnp.zeros(num_envs))

    def scale(self) -> jax.Array:
        """[] what rewards are divided by; 1 while nothing has varied, so that the first reward of a sparse task is not blown up."""
        return jnp.where(self.moments.variance > 0, jnp.sqrt(self.moments.variance + EPSILON), 1.0)

    def update(self, reward: jax.Array, ended: jax.Array, valid: jax.Array, *, discount: float) -> ReturnScale:
        """Take in the discounted sums of past rewards [T, N], which start again where an episode ended."""

        def step(running: jax.Array, row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            reward, ended = row
            running = discount * running + reward
            return jnp.where(ended, 0.0, running), running

        running, returns = jax.lax.scan(step, self.running_return, (reward, ended))
        return ReturnScale(self.moments.update(returns, valid), running)


def start_return_scale(config: Any, num_envs: int) -> ReturnScale | None:
    """Before the first reward; None where `config` leaves rewards as they are."""
    return ReturnScale.start(num_envs) if config.normalise_reward else None
