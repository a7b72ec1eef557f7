"""The cross-entropy method: a normal distribution over parameters, refitted to the best of what was drawn from it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .shapes import Scalar, check_same_shape


def select_elites(candidate: jax.Array, fitness: jax.Array, *, num_elites: int) -> jax.Array:
    """The `num_elites` candidates [P, D] of greatest fitness [P], best first: [num_elites, D]. Of equals the first.

    Rubinstein 1999, "The Cross-Entropy Method for Combinatorial and Continuous Optimization".
    """
    check_same_shape(fitness=fitness, first_parameter=candidate[:, 0])
    return candidate[jnp.argsort(fitness, descending=True, stable=True)[:num_elites]]


def refit_gaussian(elite: jax.Array, *, extra_variance: Scalar) -> tuple[jax.Array, jax.Array]:
    """Mean [D] and standard deviation [D] of elites [K, D], with `extra_variance` added to each parameter's own.

    Without it the distribution shrinks before it has found anything. Szita & Lorincz 2006, "Learning Tetris Using the Noisy
    Cross-Entropy Method".
    """
    return jnp.mean(elite, axis=0), jnp.sqrt(jnp.var(elite, axis=0) + extra_variance)


def decaying_noise(generation: jax.Array, *, start: Scalar, generations: Scalar) -> jax.Array:
    """max(0, start (1 - generation / generations)): the extra variance Z_t of Szita & Lorincz 2006."""
    return jnp.maximum(start * (1 - generation / generations), 0)
