"""Breakout: a ball on diagonals, a paddle under it, and three rows of bricks that come back when all are gone.

A brick pays 1. The ball is reflected by walls, bricks and the paddle, and straight back where it would pass the paddle's corner;
having broken a brick it flies on through any that follow at once. It is over when the ball reaches the bottom.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .game import LAST, LEFT, NOTHING, RIGHT, SIZE, Game, Outcome, cell, integers, layers, moved

BRICK_ROWS = slice(1, 4)


class State(NamedTuple):
    """Where things are; all but the bricks int32."""

    paddle: jax.Array
    ball_x: jax.Array
    ball_y: jax.Array
    toward_x: jax.Array  # 1 or -1
    toward_y: jax.Array
    last_x: jax.Array  # where the ball was
    last_y: jax.Array
    strikes: jax.Array  # bool: it has just broken a brick, or flies through others since
    bricks: jax.Array  # [10, 10] bool


def wall() -> jax.Array:
    """[10, 10] bool: all the bricks."""
    return jnp.zeros((SIZE, SIZE), bool).at[BRICK_ROWS].set(True)


def reset(draws: jax.Array) -> State:
    """The ball comes down from the left or from the right."""
    from_left = draws[0] < 0.5
    x, toward_x = jnp.where(from_left, 0, LAST), jnp.where(from_left, 1, -1)
    start = integers(paddle=4, ball_y=3, toward_y=1, last_y=3)
    return State(**start, ball_x=x, toward_x=toward_x, last_x=x, strikes=jnp.bool_(False), bricks=wall())


def advance(state: State, action: jax.Array, draws: jax.Array) -> Outcome:
    """Move the paddle, then the ball."""
    paddle = moved(state.paddle, action, LEFT, RIGHT)
    x, y = state.ball_x + state.toward_x, state.ball_y + state.toward_y
    is_side = (x < 0) | (x > LAST)
    x, toward_x = jnp.clip(x, 0, LAST), jnp.where(is_side, -state.toward_x, state.toward_x)

    is_ceiling = y < 0
    meets = cell(x, y) & state.bricks
    is_brick = jnp.any(meets)
    breaks = is_brick & ~state.strikes
    is_bottom = ~is_brick & (y == LAST)
    on_paddle = is_bottom & (state.ball_x == paddle)
    on_corner = is_bottom & ~on_paddle & (x == paddle)

    bricks = state.bricks & ~(meets & breaks)
    bricks = jnp.where(is_bottom & ~jnp.any(bricks), wall(), bricks)
    bounces = breaks | on_paddle | on_corner
    state = State(
        paddle=paddle,
        ball_x=x,
        ball_y=jnp.where(bounces, state.ball_y, jnp.maximum(y, 0)),
        toward_x=jnp.where(on_corner, -toward_x, toward_x),
        toward_y=jnp.where(bounces | is_ceiling, -state.toward_y, state.toward_y),
        last_x=state.ball_x,
        last_y=state.ball_y,
        strikes=is_brick,
        bricks=bricks,
    )
    return state, breaks.astype(jnp.float32), is_bottom & ~bounces


def observe(state: State) -> jax.Array:
    """The paddle, the ball, where it was, the bricks."""
    return layers(cell(state.paddle, LAST), cell(state.ball_x, state.ball_y), cell(state.last_x, state.last_y), state.bricks)


BREAKOUT = Game(
    channels=("paddle", "ball", "trail", "brick"),
    actions=(NOTHING, LEFT, RIGHT),
    num_draws=1,
    reset=reset,
    advance=advance,
    observe=observe,
)
