"""Epochs of minibatches over a batch of transitions, inside one compiled program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .types import PyTree

Metrics = dict[str, jax.Array]


def check_minibatch(config: Any, num_envs: int) -> None:
    """Raise a ValueError where `config.minibatch_size` does not divide the batch."""
    batch = config.num_steps * num_envs
    if batch % config.minibatch_size:
        raise ValueError(
            f"minibatch_size={config.minibatch_size} does not divide the batch of {config.num_steps} steps x {num_envs} environments "
            f"= {batch} transitions; choose a divisor, or change num_steps or the number of environments."
        )


def shuffled(key: jax.Array, size: int) -> jax.Array:
    """The numbers below `size` in random order, [size] uint32.

    Sorted as one array that holds random bits above the number, which takes a sixth of the time of `jax.random.permutation`.
    Two numbers whose random bits are equal keep their order: for a million numbers one pair in 4096.
    """
    width = max(1, (size - 1).bit_length())
    numbers = jnp.arange(size, dtype=jnp.uint32)
    keyed = (jax.random.bits(key, (size,), jnp.uint32) >> width << width) | numbers
    return jnp.sort(keyed) & jnp.uint32(2**width - 1)


def descend(
    gradient_step: Callable[[PyTree, PyTree], tuple[PyTree, Metrics]],
    carry: PyTree,
    transitions: PyTree,
    key: jax.Array,
    *,
    epochs: int,
    minibatch_size: int,
    go_on: Callable[[Metrics], jax.Array | bool] = lambda metrics: True,
) -> tuple[PyTree, Metrics]:
    """Pass `carry` through `gradient_step(carry, minibatch)` for every minibatch of every epoch.

    Each epoch shuffles the transitions [T, N, ...] anew. `go_on`, given an epoch's mean metrics, can end the epochs early.
    The last epoch's mean metrics come back with the number of `epochs` taken.
    """
    flat = jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), transitions)
    size = jax.tree.leaves(flat)[0].shape[0]

    def epoch(state: tuple[PyTree, Metrics, jax.Array]) -> tuple[PyTree, Metrics, jax.Array]:
        carry, _, index = state
        order = shuffled(jax.random.fold_in(key, index), size)
        minibatches = jax.tree.map(lambda x: x[order].reshape(-1, minibatch_size, *x.shape[1:]), flat)
        carry, metrics = jax.lax.scan(gradient_step, carry, minibatches)
        return carry, jax.tree.map(jnp.mean, metrics), index + 1

    def unfinished(state: tuple[PyTree, Metrics, jax.Array]) -> jax.Array:
        _, metrics, index = state
        return (index == 0) | ((index < epochs) & go_on(metrics))

    start = jnp.zeros((), jnp.int32)
    nothing_yet = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(epoch, (carry, {}, start))[1])
    carry, metrics, index = jax.lax.while_loop(unfinished, epoch, (carry, nothing_yet, start))
    return carry, metrics | {"epochs": index}
