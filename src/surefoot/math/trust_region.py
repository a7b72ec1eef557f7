"""Steps inside a trust region: curvature of a divergence, the direction it asks or leaves, how far to go, and how far next time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .shapes import Scalar, check_same_shape

Vector = jax.Array
PyTree = Any


def curvature_product(
    function: Callable[[Vector], PyTree], point: Vector, metric: Callable[[PyTree], PyTree]
) -> Callable[[Vector], Vector]:
    """v -> J^T G J v, for the Jacobian J of `function` at `point` and the `metric` w -> G w on its outputs.

    With the Fisher metric of the distributions that `function` gives it is the Fisher-vector product, and the Hessian of
    either KL at the point itself (Schulman et al. 2015, arXiv:1502.05477, appendix C). `function` is differentiated once,
    however often the product is taken.
    """
    _, push = jax.linearize(function, point)
    pull = jax.linear_transpose(push, point)

    def product(vector: Vector) -> Vector:
        check_same_shape(point=point, vector=vector)
        image: Vector = pull(metric(push(vector)))[0]
        return image

    return product


def conjugate_gradient(product: Callable[[Vector], Vector], target: Vector, *, num_iterations: int, tolerance: float = 1e-10) -> Vector:
    """x with product(x) = target for a positive definite `product`, after at most `num_iterations` (Hestenes & Stiefel 1952).

    It stops early once the squared residual is below `tolerance` times that of x = 0.
    """
    squared = jnp.vdot(target, target)

    def unfinished(state: tuple[jax.Array, Vector, Vector, Vector, jax.Array]) -> jax.Array:
        index, _, _, _, residual_squared = state
        return (index < num_iterations) & (residual_squared > tolerance * squared)

    def iteration(state: tuple[jax.Array, Vector, Vector, Vector, jax.Array]) -> tuple[jax.Array, Vector, Vector, Vector, jax.Array]:
        index, x, residual, direction, residual_squared = state
        image = product(direction)
        length = residual_squared / jnp.vdot(direction, image)
        residual = residual - length * image
        following = jnp.vdot(residual, residual)
        return index + 1, x + length * direction, residual, residual + following / residual_squared * direction, following

    start = jnp.zeros((), jnp.int32), jnp.zeros_like(target), target, target, squared
    return jax.lax.while_loop(unfinished, iteration, start)[1]


def trust_region_scale(direction: Vector, curvature_times_direction: Vector, *, max_divergence: Scalar) -> jax.Array:
    """The factor that takes `direction` to the edge of 1/2 s^T H s = max_divergence; 0 where the direction has no length.

    Schulman et al. 2015, arXiv:1502.05477, appendix C.
    """
    check_same_shape(direction=direction, curvature_times_direction=curvature_times_direction)
    length = jnp.vdot(direction, curvature_times_direction)
    return jnp.where(length > 0, jnp.sqrt(2 * max_divergence / jnp.where(length > 0, length, 1)), 0)


def backtracking_line_search(
    acceptable: Callable[[jax.Array], jax.Array], *, factor: float, num_tries: int, dtype: Any = jnp.float32
) -> tuple[jax.Array, jax.Array]:
    """(the largest of 1, factor, factor^2, ... that is `acceptable`, how many were tried); 0 where none of `num_tries` is."""

    def rejected(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        index, is_accepted = state
        return (index < num_tries) & ~is_accepted

    def attempt(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        index, _ = state
        return index + 1, acceptable(jnp.power(jnp.asarray(factor, dtype), index))

    tries, is_accepted = jax.lax.while_loop(rejected, attempt, (jnp.zeros((), jnp.int32), jnp.zeros((), bool)))
    return jnp.where(is_accepted, jnp.power(jnp.asarray(factor, dtype), tries - 1), 0), tries


def dual_ascent(multiplier: jax.Array, divergence: jax.Array, *, max_divergence: Scalar, step_size: Scalar) -> jax.Array:
    """max(0, multiplier + step_size (divergence - max_divergence)): a step up the dual of maximising under divergence <= max_divergence.

    The gradient of the dual in its multiplier is how far the maximiser of the Lagrangian breaks the bound, and a multiplier is never
    negative. Boyd & Vandenberghe 2004, "Convex Optimization", sections 5.1 and 5.2.
    """
    check_same_shape(multiplier=multiplier, divergence=divergence)
    return jnp.maximum(multiplier + step_size * (divergence - max_divergence), 0)


def project_onto_half_space(vector: jax.Array, normal: jax.Array, *, bound: Scalar) -> jax.Array:
    """The nearest z to each vector [..., D] with normal . z <= bound: z = g - max(0, (k . g - bound) / |k|^2) k.

    Wang et al. 2017, arXiv:1611.01224, section 3.3, with the gradient g of the policy's statistics and that of a divergence, k.
    A vector is left as it is where the normal is 0.
    """
    check_same_shape(vector=vector, normal=normal)
    squared = jnp.sum(jnp.square(normal), axis=-1, keepdims=True)
    excess = jnp.maximum(jnp.sum(normal * vector, axis=-1, keepdims=True) - bound, 0)
    return vector - jnp.where(squared > 0, excess / jnp.where(squared > 0, squared, 1), 0) * normal


def adaptive_step_size(step_size: jax.Array, kl: jax.Array, *, target: Scalar, factor: Scalar = 1.5, tolerance: Scalar = 2.0) -> jax.Array:
    """The step size after a step that went `kl` far: divided by `factor` above target x tolerance, times it below target / tolerance.

    Schulman et al. 2017, arXiv:1707.06347, footnote 3 to section 6.2: the vanilla policy gradient that they compare with.
    """
    check_same_shape(step_size=step_size, kl=kl)
    too_far, too_near = kl > target * tolerance, kl < target / tolerance
    return jnp.where(too_far, step_size / factor, jnp.where(too_near, step_size * factor, step_size))
