"""Statistics over the rows that count: `mask` is boolean, of the shape of x; all axes are reduced.

Where the mask is empty, means and variances are 0, as is the gradient of a loss over no rows; undefined statistics are NaN.
"""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp

from .shapes import Scalar, check_same_shape

Tree = TypeVar("Tree")

# Added to the standard deviation. Far below any spread that matters; a constant x becomes 0.
STANDARDISE_EPSILON = 1e-8


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of x over the mask."""
    check_same_shape(x=x, mask=mask)
    return jnp.sum(x, where=mask) / jnp.maximum(jnp.sum(mask), 1)


def masked_variance(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Population variance of x over the mask."""
    check_same_shape(x=x, mask=mask)
    return masked_mean(jnp.square(_centre(x, mask)), mask)


def standardise(x: jax.Array, mask: jax.Array) -> jax.Array:
    """(x - mean) / (standard deviation + 1e-8) over the mask, 0 outside it."""
    check_same_shape(x=x, mask=mask)
    return jnp.where(mask, _centre(x, mask) / (jnp.sqrt(masked_variance(x, mask)) + STANDARDISE_EPSILON), 0)


def _centre(x: jax.Array, mask: jax.Array) -> jax.Array:
    # A float32 mean is off by rounding, which would be all the spread that a constant x has. The second pass removes it.
    once = x - masked_mean(x, mask)
    return once - masked_mean(once, mask)


def mean_standard_error(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Standard error of the mean of independent samples x over the mask; NaN for fewer than two."""
    check_same_shape(x=x, mask=mask)
    count = jnp.sum(mask)
    return jnp.where(count > 1, jnp.sqrt(masked_variance(x, mask) / jnp.maximum(count - 1, 1)), jnp.nan)


def explained_variance(value: jax.Array, value_target: jax.Array, mask: jax.Array) -> jax.Array:
    """1 - Var[value_target - value] / Var[value_target]: 1 is perfect, 0 no better than a constant; NaN where targets are constant."""
    check_same_shape(value=value, value_target=value_target, mask=mask)
    variance = masked_variance(value_target, mask)
    return jnp.where(variance > 0, 1 - masked_variance(value_target - value, mask) / variance, jnp.nan)


def effective_sample_size(weight: jax.Array, mask: jax.Array) -> jax.Array:
    """(sum w)^2 / sum w^2: how many equally weighted samples are worth as much. Kish 1965."""
    check_same_shape(weight=weight, mask=mask)
    return jnp.square(jnp.sum(weight, where=mask)) / jnp.sum(jnp.square(weight), where=mask)


def leave_one_out_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of the other samples of the mask, a baseline independent of the sample it is for; 0 where there is no other.

    Kool, van Hoof & Welling 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!". Where an episode's rows share one return,
    mark one of them: the result is right at all of them.
    """
    check_same_shape(x=x, mask=mask)
    others = jnp.sum(mask) - 1
    return jnp.where(others > 0, (jnp.sum(x, where=mask) - x) / jnp.maximum(others, 1), 0)


def polyak(target: Tree, online: Tree, *, rate: Scalar) -> Tree:
    """(1 - rate) target + rate online at each leaf of two pytrees of one structure. Rate 1 copies exactly."""

    def leaf(target: jax.Array, online: jax.Array) -> jax.Array:
        check_same_shape(target=target, online=online)
        return (1 - rate) * target + rate * online

    mixed: Tree = jax.tree.map(leaf, target, online)
    return mixed
