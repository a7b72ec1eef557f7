"""Gradient steps inside one compiled program: one on a batch, or epochs of minibatches over it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .types import PyTree

Metrics = dict[str, jax.Array]
Loss = Callable[[Any], tuple[jax.Array, Metrics]]


def check_minibatch(config: Any, num_envs: int) -> None:
    """Raise a ValueError where `config.minibatch_size` does not divide the batch."""
    batch = config.num_steps * num_envs
    if config.minibatch_size is not None and batch % config.minibatch_size:
        raise ValueError(
            f"minibatch_size={config.minibatch_size} does not divide the batch of {config.num_steps} steps x {num_envs} environments "
            f"= {batch} transitions; choose a divisor, or change num_steps or the number of environments."
        )


def check_sequences(config: Any) -> None:
    """Raise a ValueError where a memory is learned from sequences that divide neither batch nor minibatch."""
    for name in ("num_steps", "minibatch_size"):
        if config.memory != "none" and getattr(config, name) % config.sequence_length:
            raise ValueError(
                f"A policy with a memory learns from sequences, and sequence_length={config.sequence_length} does not divide "
                f"{name}={getattr(config, name)}; choose a divisor of both num_steps and minibatch_size."
            )


def sequence_length(config: Any) -> int:
    """Steps in a row that minibatches are made of."""
    return 1 if config.memory == "none" else int(config.sequence_length)


def scheduled(value: float, schedule: str, progress: jax.Array) -> jax.Array | float:
    """A setting as it stands after the fraction `progress` of the run: as it was, or falling linearly to 0."""
    return value * (1.0 - progress) if schedule == "linear" else value


def clipped_adam(config: Any) -> optax.GradientTransformation:
    """Adam on gradients of a norm of at most `config.max_grad_norm`; `gradient_step` applies the step size, which may have a schedule."""
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optax.scale_by_adam(eps=1e-5))


def clipped_optimiser(config: Any) -> optax.GradientTransformation:
    """The same with `config.optimiser`: Adam, or RMSprop with the epsilon inside the root and a mean square that begins at 1."""
    if config.optimiser == "adam":
        return clipped_adam(config)
    scale = optax.scale_by_rms(decay=0.99, eps=1e-5, initial_scale=1.0, eps_in_sqrt=True)
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), scale)


def gradient_step(
    loss: Loss, parameters: PyTree, moments: optax.OptState, optimiser: optax.GradientTransformation, learning_rate: Any
) -> tuple[tuple[PyTree, optax.OptState], Metrics]:
    """(parameters and moments after one step down the loss, its metrics with the norm of the gradient).

    Small networks are best given as one vector: a step is then one small loop, and not one for each layer.
    """
    gradient, metrics = jax.grad(loss, has_aux=True)(parameters)
    direction, moments = optimiser.update(gradient, moments)
    parameters = jax.tree.map(lambda old, step: old - learning_rate * step, parameters, direction)
    return (parameters, moments), metrics | {"gradient_norm": optax.tree.norm(gradient)}


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
    step: Callable[[PyTree, PyTree], tuple[PyTree, Metrics]],
    carry: PyTree,
    transitions: PyTree,
    key: jax.Array,
    *,
    epochs: int,
    minibatch_size: int,
    length: int = 1,
    go_on: Callable[[Metrics], jax.Array | bool] = lambda metrics: True,
) -> tuple[PyTree, Metrics]:
    """Pass `carry` through `step(carry, minibatch)` for every minibatch of every epoch.

    The transitions [T, N, ...] are divided into sequences of `length` steps, which each epoch shuffles anew; a minibatch
    [length, B, ...] holds `minibatch_size` transitions. `go_on`, given an epoch's mean metrics, can end the epochs early. The
    last epoch's mean metrics come back with the number of `epochs` taken.
    """

    def sequences(x: jax.Array) -> jax.Array:
        """[T, N, ...] -> [T N / length, length, ...]"""
        num_steps, num_envs, *shape = x.shape
        return x.reshape(num_steps // length, length, num_envs, *shape).swapaxes(1, 2).reshape(-1, length, *shape)

    divided = jax.tree.map(sequences, transitions)
    size = jax.tree.leaves(divided)[0].shape[0]

    def minibatches(x: jax.Array, order: jax.Array) -> jax.Array:
        """[number of minibatches, length, B, ...]"""
        return x[order].reshape(-1, minibatch_size // length, length, *x.shape[2:]).swapaxes(1, 2)

    def epoch(state: tuple[PyTree, Metrics, jax.Array]) -> tuple[PyTree, Metrics, jax.Array]:
        carry, _, index = state
        order = shuffled(jax.random.fold_in(key, index), size)
        carry, metrics = jax.lax.scan(step, carry, jax.tree.map(lambda x: minibatches(x, order), divided))
        return carry, jax.tree.map(jnp.mean, metrics), index + 1

    def unfinished(state: tuple[PyTree, Metrics, jax.Array]) -> jax.Array:
        _, metrics, index = state
        return (index == 0) | ((index < epochs) & go_on(metrics))

    start = jnp.zeros((), jnp.int32)
    nothing_yet = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(epoch, (carry, {}, start))[1])
    carry, metrics, index = jax.lax.while_loop(unfinished, epoch, (carry, nothing_yet, start))
    return carry, metrics | {"epochs": index}
