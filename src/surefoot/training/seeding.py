"""One seed, many generators: each is derived by name, so that a new component moves no other's numbers."""

from __future__ import annotations

import zlib

import jax
import numpy as np


def key_for(seed: int, name: str) -> jax.Array:
    """The JAX key of the component `name` in a run seeded `seed`; ValueError where JAX would take it for another seed."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"The seed must lie in [0, 2^32), got {seed}.")
    return jax.random.fold_in(jax.random.key(seed), np.uint32(zlib.crc32(name.encode())))


def seed_for(seed: int, name: str) -> int:
    """The same for components that take an integer seed."""
    return int(np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(1)[0])
