"""Freeway: cross a road of eight lanes from the bottom to the top, as often as 2,501 steps allow.

A crossing pays 1 and gives every car another speed. A car that hits the chicken sends it back to the start, for nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .game import DOWN, LAST, NOTHING, SIZE, UP, Game, Outcome, below, cell, column, counted_down, integers, layers, moved

LANES = 8  # rows 1 to 8
CHICKEN_X = 4
CHICKEN_INTERVAL = 3  # steps between two of its moves
SLOWEST = 5  # steps between two moves of the slowest car
TIME_LIMIT = 2500


class State(NamedTuple):
    """The chicken, the cars and the time left, int32."""

    chicken_y: jax.Array
    move_timer: jax.Array  # until the chicken can move
    car_x: jax.Array  # [8]
    car_timer: jax.Array  # [8] until the car moves
    car_speed: jax.Array  # [8] steps between two of its moves; negative to the left
    time_left: jax.Array


def speeds(draws: jax.Array) -> jax.Array:
    """[8] -5 to 5 without 0, each as likely."""
    number = below(draws, 2 * SLOWEST)
    return jnp.where(number < SLOWEST, number + 1, SLOWEST - 1 - number)


def reset(draws: jax.Array) -> State:
    """The chicken at the bottom, and all cars at the left."""
    speed = speeds(draws)
    start = integers(chicken_y=LAST, move_timer=CHICKEN_INTERVAL, time_left=TIME_LIMIT)
    return State(**start, car_x=jnp.zeros(LANES, jnp.int32), car_timer=jnp.abs(speed), car_speed=speed)


def advance(state: State, action: jax.Array, draws: jax.Array) -> Outcome:
    """The chicken moves if it can, then the cars. Draws: the speed that each car has after a crossing."""
    can_move = state.move_timer == 0
    walks = can_move & ((action == UP) | (action == DOWN))
    y = jnp.where(can_move, moved(state.chicken_y, action, UP, DOWN), state.chicken_y)
    move_timer = counted_down(jnp.where(walks, CHICKEN_INTERVAL, state.move_timer))

    crossed = y == 0
    y = jnp.where(crossed, LAST, y)
    speed = jnp.where(crossed, speeds(draws), state.car_speed)
    timer = jnp.where(crossed, jnp.abs(speed), state.car_timer)
    drives = timer == 0
    x = jnp.where(drives, (state.car_x + jnp.sign(speed)) % SIZE, state.car_x)
    is_hit = jnp.any((jnp.arange(1, LANES + 1) == y) & ((state.car_x == CHICKEN_X) | (x == CHICKEN_X)))

    state = State(
        chicken_y=jnp.where(is_hit, LAST, y),
        move_timer=move_timer,
        car_x=x,
        car_timer=jnp.where(drives, jnp.abs(speed), timer - 1),
        car_speed=speed,
        time_left=state.time_left - 1,
    )
    return state, crossed.astype(jnp.float32), state.time_left < 0


def observe(state: State) -> jax.Array:
    """The chicken, the cars, and the cells behind cars of each speed, from the fastest to the slowest."""
    behind = (state.car_x - jnp.sign(state.car_speed)) % SIZE
    trails = [column(behind, jnp.abs(state.car_speed) == speed) for speed in range(1, SLOWEST + 1)]
    return layers(cell(jnp.int32(CHICKEN_X), state.chicken_y), column(state.car_x), *trails)


FREEWAY = Game(
    channels=("chicken", "car", *(f"speed {speed}" for speed in range(1, SLOWEST + 1))),
    actions=(NOTHING, UP, DOWN),
    num_draws=LANES,
    reset=reset,
    advance=advance,
    observe=observe,
)
