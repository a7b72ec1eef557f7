"""What the five games share: the board, the actions, and what a game is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

SIZE = 10  # cells of a side of the board
LAST = SIZE - 1
NOTHING, LEFT, UP, RIGHT, DOWN, FIRE = range(6)
NUM_ACTIONS = 6

# (state, reward, terminated)
Outcome = tuple[Any, jax.Array, jax.Array]


class Game(NamedTuple):
    """A game as pure functions. What is random in it follows from `num_draws` numbers in [0, 1), drawn anew for each call."""

    channels: tuple[str, ...]  # what the layers of an observation show
    actions: tuple[int, ...]  # those that do something here
    num_draws: int
    reset: Callable[[jax.Array], Any]  # draws -> state
    advance: Callable[[Any, jax.Array, jax.Array], Outcome]  # (state, one of all six actions, draws)
    observe: Callable[[Any], jax.Array]  # state -> [10, 10, C] bool: row from the top, column from the left, channel


def cell(x: jax.Array, y: jax.Array) -> jax.Array:
    """[10, 10] bool: the cell in column x of row y alone, or none where it is off the board."""
    return (jnp.arange(SIZE)[:, None] == y) & (jnp.arange(SIZE) == x)


def column(x: jax.Array, present: jax.Array | bool = True) -> jax.Array:
    """[10, 10] bool: for each of the rows 1 to 8 the cell in column x [8], where something is present [8]."""
    return jnp.pad((jnp.arange(SIZE) == x[:, None]) & jnp.broadcast_to(present, x.shape)[:, None], ((1, 1), (0, 0)))


def layers(*boards: jax.Array) -> jax.Array:
    """An observation [10, 10, C] of boards [10, 10]."""
    return jnp.moveaxis(jnp.stack(boards), 0, -1)  # stacked along the last axis, Seaquest's ten take half as long again


def is_off(x: jax.Array) -> jax.Array:
    """Whether a column is off the board."""
    return (x < 0) | (x > LAST)


def moved(position: jax.Array, action: jax.Array, back: int, forth: int, low: int = 0, high: int = LAST) -> jax.Array:
    """A coordinate after an action that may take it one cell back or forth, within [low, high]."""
    return jnp.clip(position + (action == forth) - (action == back), low, high)


def ahead(right: jax.Array) -> jax.Array:
    """The step along x of what moves to the right, or else to the left."""
    return jnp.where(right, 1, -1)


def counted_down(timer: jax.Array) -> jax.Array:
    """A timer that waits at 0 until it is set."""
    return jnp.maximum(timer - 1, 0)


def below(draw: jax.Array, count: jax.Array | int) -> jax.Array:
    """A whole number in [0, count), each as likely, from a number in [0, 1)."""
    return jnp.floor(draw * count).astype(jnp.int32)


def integers(**values: int) -> dict[str, jax.Array]:
    """Numbers of a state as arrays of one type."""
    return {name: jnp.int32(value) for name, value in values.items()}
