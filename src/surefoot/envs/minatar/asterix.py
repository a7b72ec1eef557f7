"""Asterix: walk about, take the gold, and keep out of the enemies' way; both cross the board in rows of their own.

Gold pays 1. It is over when the player and an enemy share a cell. From time to time everything comes more often, and moves faster.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .game import DOWN, LAST, LEFT, NOTHING, RIGHT, UP, Game, Outcome, ahead, below, cell, column, integers, is_off, layers, moved

ROWS = 8  # rows 1 to 8 have room for one thing each
RAMP_INTERVAL = 100  # steps between two increases of the difficulty, and two more
FIRST_SPAWN_INTERVAL, FIRST_MOVE_INTERVAL = 10, 5  # steps


class State(NamedTuple):
    """The player, what is in each row, and the clocks; int32 where nothing else is said."""

    player_x: jax.Array
    player_y: jax.Array
    present: jax.Array  # [8] bool
    x: jax.Array  # [8]
    right: jax.Array  # [8] bool: it moves to the right
    gold: jax.Array  # [8] bool: it is gold and no enemy
    spawn_interval: jax.Array
    spawn_timer: jax.Array
    move_interval: jax.Array
    move_timer: jax.Array
    ramp_timer: jax.Array
    ramp_index: jax.Array  # increases of the difficulty so far


def reset(draws: jax.Array) -> State:
    """The player in the middle of an empty board."""
    nothing = jnp.zeros(ROWS, bool)
    clocks = integers(
        spawn_interval=FIRST_SPAWN_INTERVAL,
        spawn_timer=FIRST_SPAWN_INTERVAL,
        move_interval=FIRST_MOVE_INTERVAL,
        move_timer=FIRST_MOVE_INTERVAL,
        ramp_timer=RAMP_INTERVAL,
        ramp_index=0,
    )
    return State(**integers(player_x=5, player_y=5), present=nothing, x=jnp.zeros(ROWS, jnp.int32), right=nothing, gold=nothing, **clocks)


def spawn(state: State, draws: jax.Array) -> State:
    """Something enters a free row at random when it is time, if there is one. Draws: direction, gold or enemy, row."""
    right, gold = draws[0] < 1 / 2, draws[1] < 1 / 3
    free = ~state.present
    rank = jnp.sum(jnp.tri(ROWS, dtype=jnp.int32) * free, axis=-1)  # the k-th free row has rank k
    enters = (state.spawn_timer == 0) & free & (rank == below(draws[2], jnp.sum(free)) + 1)
    return state._replace(
        present=state.present | enters,
        x=jnp.where(enters, jnp.where(right, 0, LAST), state.x),
        right=jnp.where(enters, right, state.right),
        gold=jnp.where(enters, gold, state.gold),
        spawn_timer=jnp.where(state.spawn_timer == 0, state.spawn_interval, state.spawn_timer),
    )


def advance(state: State, action: jax.Array, draws: jax.Array) -> Outcome:
    """Something may enter, the player moves, then everything else does when it is time."""
    state = spawn(state, draws)
    player_x, player_y = moved(state.player_x, action, LEFT, RIGHT), moved(state.player_y, action, UP, DOWN, 1, ROWS)
    in_row = state.present & (jnp.arange(1, ROWS + 1) == player_y)

    met = in_row & (state.x == player_x)
    moves = state.move_timer == 0
    x = jnp.where(moves & state.present & ~(met & state.gold), state.x + ahead(state.right), state.x)
    met |= in_row & (x == player_x)
    taken = met & state.gold

    ramps = (state.spawn_interval > 1) | (state.move_interval > 1)
    harder = ramps & (state.ramp_timer < 0)
    faster = harder & (state.move_interval > 1) & (state.ramp_index % 2 == 1)
    state = State(
        player_x=player_x,
        player_y=player_y,
        present=state.present & ~taken & ~is_off(x),
        x=x,
        right=state.right,
        gold=state.gold,
        spawn_interval=state.spawn_interval - (harder & (state.spawn_interval > 1)),
        spawn_timer=state.spawn_timer - 1,
        move_interval=state.move_interval - faster,
        move_timer=jnp.where(moves, state.move_interval, state.move_timer) - 1,
        ramp_timer=jnp.where(harder, RAMP_INTERVAL, state.ramp_timer - ramps),
        ramp_index=state.ramp_index + harder,
    )
    return state, jnp.sum(taken).astype(jnp.float32), jnp.any(met & ~state.gold)


def observe(state: State) -> jax.Array:
    """The player, the enemies, the cells behind enemies and gold, the gold."""
    return layers(
        cell(state.player_x, state.player_y),
        column(state.x, state.present & ~state.gold),
        column(state.x - ahead(state.right), state.present),
        column(state.x, state.present & state.gold),
    )


ASTERIX = Game(
    channels=("player", "enemy", "trail", "gold"),
    actions=(NOTHING, LEFT, UP, RIGHT, DOWN),
    num_draws=3,
    reset=reset,
    advance=advance,
    observe=observe,
)
