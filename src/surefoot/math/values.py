"""Targets and losses of value functions. Losses are elementwise; the caller reduces."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .shapes import Scalar, check_same_shape


def td_target(reward: jax.Array, next_value: jax.Array, terminated: jax.Array, *, discount: Scalar) -> jax.Array:
    """r + discount V(s'), and r alone where the episode terminated. Gradient-free. Sutton & Barto 2018, eq. 6.2."""
    check_same_shape(reward=reward, next_value=next_value, terminated=terminated)
    return jax.lax.stop_gradient(reward + discount * jnp.where(terminated, 0, next_value))


def squared_value_loss(value: jax.Array, value_target: jax.Array) -> jax.Array:
    """(value - value_target)^2 / 2, so that the gradient is the error. None reaches the target."""
    check_same_shape(value=value, value_target=value_target)
    return 0.5 * jnp.square(value - jax.lax.stop_gradient(value_target))


def clipped_value_loss(value: jax.Array, old_value: jax.Array, value_target: jax.Array, *, clip: Scalar) -> jax.Array:
    """The larger of the squared loss and the squared loss of a value held within `clip` of the old one, halved.

    In no paper's equations, but in the code that PPO's results were made with: Engstrom et al. 2020, arXiv:2005.12729, section 2.
    """
    check_same_shape(value=value, old_value=old_value, value_target=value_target)
    old_value = jax.lax.stop_gradient(old_value)
    held = old_value + jnp.clip(value - old_value, -clip, clip)
    return jnp.maximum(squared_value_loss(value, value_target), squared_value_loss(held, value_target))


def huber(error: jax.Array, *, delta: Scalar) -> jax.Array:
    """error^2 / 2 up to `delta`, beyond it linear with slope `delta`. Huber 1964."""
    quadratic = jnp.minimum(jnp.abs(error), delta)
    return 0.5 * jnp.square(quadratic) + delta * (jnp.abs(error) - quadratic)
