"""Sums along time that stop where an episode does. Time is the first axis of every argument: [T, ...]."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .shapes import check_same_shape


def linear_recurrence(term: jax.Array, decay: jax.Array, *, reverse: bool = False) -> jax.Array:
    """y_t = term_t + decay_t y_{t-1} with y = 0 before the first row; `reverse` runs from the last row to the first.

    Row by row, so that rounding does not depend on where in the batch an episode lies. On a CPU it is faster than an associative scan.
    """
    check_same_shape(term=term, decay=decay)

    def step(previous: jax.Array, row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        current = row[0] + row[1] * previous
        return current, current

    return jax.lax.scan(step, jnp.zeros_like(term[0]), (term, decay.astype(term.dtype)), reverse=reverse)[1]


def continues(terminated: jax.Array, truncated: jax.Array) -> jax.Array:
    """Whether the next row of the batch holds the next step of the same episode: never after the last row. [T, ...] bool."""
    check_same_shape(terminated=terminated, truncated=truncated)
    return jnp.logical_not(jnp.logical_or(terminated, truncated)).at[-1].set(False)


def episode_cumsum(x: jax.Array, terminated: jax.Array, truncated: jax.Array) -> jax.Array:
    """Sum of x over the rows of the same episode up to and including each row."""
    check_same_shape(x=x, terminated=terminated, truncated=truncated)
    follows = jnp.roll(continues(terminated, truncated), 1, axis=0)  # the last row never continues, so row 0 never follows
    return linear_recurrence(x, follows)


def episode_sum(x: jax.Array, terminated: jax.Array, truncated: jax.Array) -> jax.Array:
    """Sum of x over those rows of the batch that belong to the same episode, at each of them."""
    check_same_shape(x=x, terminated=terminated, truncated=truncated)
    goes_on = continues(terminated, truncated)
    sum_at_end = jnp.where(goes_on, 0, episode_cumsum(x, terminated, truncated))
    return linear_recurrence(sum_at_end, goes_on, reverse=True)
