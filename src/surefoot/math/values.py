"""Targets and losses of value functions. Losses are elementwise; the caller reduces."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .shapes import Scalar, check_same_shape


def td_target(reward: jax.Array, next_value: jax.Array, terminated: jax.Array, *, discount: Scalar) -> jax.Array:
    """r + discount V(s'), and r alone where the episode terminated. Gradient-free. Sutton & Barto 2018, eq. 6.2."""
    check_same_shape(reward=reward, next_value=next_value, terminated=terminated)
    return jax.lax.stop_gradient(reward + discount * jnp.where(terminated, 0, next_value))


def n_step_target(reward: jax.Array, next_value: jax.Array, discount: jax.Array) -> jax.Array:
    """R + discount V(s_m) of the n-step sum of rewards R, already discounted. Gradient-free. Sutton & Barto 2018, eq. 7.1.

    `discount` [...] is gamma^m where the successor after m steps has a future, and 0 where it has none; its value is ignored there.
    """
    check_same_shape(reward=reward, next_value=next_value, discount=discount)
    return jax.lax.stop_gradient(reward + discount * jnp.where(discount == 0, 0, next_value))


def max_value(q: jax.Array, action_mask: jax.Array | None = None) -> jax.Array:
    """max_a Q(s, a) over the legal actions, [..., A] -> [...]; each row has at least one. Sutton & Barto 2018, eq. 6.8."""
    if action_mask is not None:
        check_same_shape(q=q, action_mask=action_mask)
    return jnp.max(q, axis=-1, initial=-jnp.inf, where=action_mask)


def double_q_value(online_q: jax.Array, target_q: jax.Array, action_mask: jax.Array | None = None) -> jax.Array:
    """Q_target(s, argmax_a Q_online(s, a)) over the legal actions, [..., A] -> [...]: one network chooses, the other judges.

    van Hasselt, Guez & Silver 2016, arXiv:1509.06461, eq. 4.
    """
    check_same_shape(online_q=online_q, target_q=target_q)
    if action_mask is not None:
        check_same_shape(online_q=online_q, action_mask=action_mask)
        online_q = jnp.where(action_mask, online_q, -jnp.inf)
    return jnp.take_along_axis(target_q, jnp.argmax(online_q, axis=-1, keepdims=True), axis=-1)[..., 0]


def twin_minimum(q: jax.Array) -> jax.Array:
    """The smaller of two critics' values, [2, ...] -> [...]. Fujimoto, van Hoof & Meger 2018, arXiv:1802.09477, eq. 10."""
    return jnp.min(q, axis=0)


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
