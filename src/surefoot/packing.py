"""Many small arrays from a compiled program as one for each dtype: fetching an array costs the host 10 us, however small it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .types import PyTree


class Place(NamedTuple):
    """Where an array lies in the vector of its dtype."""

    dtype: str
    begin: int
    shape: tuple[int, ...]


class Packed(eqx.Module):
    """The leaves of a tree, one after the other."""

    vectors: dict[str, jax.Array]  # by dtype
    places: tuple[Place, ...] = eqx.field(static=True)
    structure: Any = eqx.field(static=True)


def pack(tree: PyTree) -> Packed:
    """All leaves of `tree`, inside a compiled program."""
    leaves, structure = jax.tree.flatten(tree)
    parts: dict[str, list[jax.Array]] = {}
    sizes: dict[str, int] = {}
    places = []
    for leaf in map(jnp.asarray, leaves):
        dtype = str(leaf.dtype)
        places.append(Place(dtype, sizes.get(dtype, 0), leaf.shape))
        parts.setdefault(dtype, []).append(leaf.ravel())
        sizes[dtype] = sizes.get(dtype, 0) + leaf.size
    return Packed({dtype: jnp.concatenate(several) for dtype, several in parts.items()}, tuple(places), structure)


def unpack(packed: Packed) -> PyTree:
    """The tree that was packed, of NumPy arrays."""
    vectors = {dtype: np.asarray(vector) for dtype, vector in packed.vectors.items()}
    leaves = [vectors[p.dtype][p.begin : p.begin + math.prod(p.shape)].reshape(p.shape) for p in packed.places]
    return jax.tree.unflatten(packed.structure, leaves)


def packing_last(function: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """`function` with the last of its results packed."""

    def packed(*arguments: Any) -> tuple[Any, ...]:
        *others, last = function(*arguments)
        return *others, pack(last)

    return packed
