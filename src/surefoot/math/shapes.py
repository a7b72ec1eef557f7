"""The guard that every function here calls first."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Scalar = float | jax.Array


def check_same_shape(**arrays: Any) -> None:
    """Raise ValueError unless all arrays have one shape. Shapes are static, so it costs nothing in a compiled program.

    [T] against [T, 1] would broadcast to [T, T]: a loss that runs, decreases, and is wrong.
    """
    shapes = {name: jnp.shape(array) for name, array in arrays.items()}
    if len(set(shapes.values())) > 1:
        given = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"shapes differ: {given}. They must be equal, as nothing is broadcast here; reshape one of them.")
