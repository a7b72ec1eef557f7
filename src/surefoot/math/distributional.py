"""Distributions of returns: projection onto a fixed support, and regression of quantiles. Losses are elementwise; the caller reduces."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .shapes import Scalar, check_same_shape
from .values import huber


def categorical_projection(probability: jax.Array, atom: jax.Array, support: jax.Array) -> jax.Array:
    """Probabilities [..., K] on atoms [..., K], moved onto the equally spaced `support` [K], ascending. [..., K], gradient-free.

    An atom between two neighbours of the support is shared by them, each the more the nearer it is, which keeps the mean; one beyond an
    end goes to that end. Bellemare, Dabney & Munos 2017, arXiv:1707.06887, eq. 7, with atoms r + discount z_j.
    """
    check_same_shape(probability=probability, atom=atom)
    check_same_shape(support=support, atoms_of_one_row=atom[(0,) * (atom.ndim - 1)])
    last = len(support) - 1
    # In units of the spacing, whose whole numbers are exact: the two shares of an atom then sum to 1.
    place = jnp.clip((atom - support[0]) / (support[last] - support[0]) * last, 0, last)
    share = jnp.maximum(1 - jnp.abs(place[..., None] - jnp.arange(last + 1, dtype=atom.dtype)), 0)
    return jax.lax.stop_gradient(jnp.einsum("...j,...ji->...i", probability, share))


def categorical_cross_entropy(log_probability: jax.Array, target_probability: jax.Array) -> jax.Array:
    """-sum_i m_i log p_i over the last axis, [..., K] -> [...]; no gradient reaches the target m.

    What the target gives no probability adds nothing, be log p = -inf or not. Bellemare, Dabney & Munos 2017, arXiv:1707.06887,
    algorithm 1.
    """
    check_same_shape(log_probability=log_probability, target_probability=target_probability)
    target_probability = jax.lax.stop_gradient(target_probability)
    return -jnp.sum(target_probability * jnp.where(target_probability > 0, log_probability, 0), axis=-1)


def quantile_huber_loss(quantile: jax.Array, target: jax.Array, *, delta: Scalar = 1.0) -> jax.Array:
    """sum_i mean_j |tau_i - 1{u_ij < 0}| huber(u_ij) / delta with u_ij = target_j - quantile_i: [..., K], [..., M] -> [...].

    Dabney et al. 2018a, arXiv:1710.10044, eq. 10, with the midpoints tau_i = (i - 1/2) / K; divided by delta as in Dabney et al. 2018b,
    arXiv:1806.06923, eq. 3, so that it becomes the loss of quantile regression as delta goes to 0. No gradient reaches the target.
    """
    check_same_shape(first_quantile=quantile[..., 0], first_target=target[..., 0])
    midpoint = (jnp.arange(quantile.shape[-1], dtype=quantile.dtype) + 0.5) / quantile.shape[-1]
    error = jax.lax.stop_gradient(target)[..., None, :] - quantile[..., :, None]
    weight = jnp.abs(midpoint[:, None] - (error < 0).astype(error.dtype))
    return jnp.sum(jnp.mean(weight * huber(error, delta=delta) / delta, axis=-1), axis=-1)
