"""Space Invaders: a cannon under aliens that march from side to side, come down a row at each side, and shoot at it.

An alien that is shot pays 1. The fewer are left, the faster they march; a wave that is shot is followed by a faster one. It is over
when an alien or its bullet hits the cannon, or when the aliens would march on from the bottom.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .game import FIRE, LAST, LEFT, NOTHING, RIGHT, SIZE, Game, Outcome, cell, counted_down, integers, layers, moved

SHOT_INTERVAL = 5  # steps between two shots of the cannon
ALIEN_SHOT_INTERVAL = 10
FIRST_MOVE_INTERVAL, SHORTEST_MOVE_INTERVAL = 12, 6  # of the first wave, and of the last that differs


class State(NamedTuple):
    """Cannon, aliens, bullets and clocks; int32 where nothing else is said."""

    cannon: jax.Array
    shot_timer: jax.Array
    bullets: jax.Array  # [10, 10] bool
    aliens: jax.Array  # [10, 10] bool
    alien_bullets: jax.Array  # [10, 10] bool
    direction: jax.Array  # of the aliens, 1 or -1
    move_interval: jax.Array  # of the aliens at most
    move_timer: jax.Array
    alien_shot_timer: jax.Array


def wave() -> jax.Array:
    """[10, 10] bool: all the aliens, in their first places."""
    return jnp.zeros((SIZE, SIZE), bool).at[0:4, 2:8].set(True)


def reset(draws: jax.Array) -> State:
    """The first wave, marching to the left."""
    clocks = integers(shot_timer=0, move_interval=FIRST_MOVE_INTERVAL, move_timer=FIRST_MOVE_INTERVAL, alien_shot_timer=ALIEN_SHOT_INTERVAL)
    nothing = jnp.zeros((SIZE, SIZE), bool)
    return State(**integers(cannon=5, direction=-1), aliens=wave(), bullets=nothing, alien_bullets=nothing, **clocks)


def nearest(aliens: jax.Array, x: jax.Array) -> jax.Array:
    """[10, 10] bool: the lowest alien in the column nearest to x, of two the left one."""
    distance = jnp.where(jnp.any(aliens, axis=0), jnp.abs(jnp.arange(SIZE) - x), SIZE)
    column = jnp.argmin(distance)
    return cell(column, jnp.max(jnp.where(aliens[:, column], jnp.arange(SIZE), -1)))


def advance(state: State, action: jax.Array, draws: jax.Array) -> Outcome:
    """The cannon moves or shoots, then bullets fly, and aliens march and shoot when it is time."""
    fires = (action == FIRE) & (state.shot_timer == 0)
    cannon = moved(state.cannon, action, LEFT, RIGHT)
    none = jnp.zeros((1, SIZE), bool)
    bullets = jnp.concatenate([state.bullets[1:-1], (state.bullets[-1:] | (fires & (jnp.arange(SIZE) == cannon))), none])
    alien_bullets = jnp.concatenate([none, state.alien_bullets[:-1]])

    aliens, marches = state.aliens, state.move_timer == 0
    turns = marches & jnp.where(state.direction < 0, jnp.any(aliens[:, 0]), jnp.any(aliens[:, LAST]))
    landed = turns & jnp.any(aliens[LAST])
    sideways = jnp.where(state.direction < 0, jnp.roll(aliens, -1, axis=1), jnp.roll(aliens, 1, axis=1))
    marched = jnp.where(turns, jnp.roll(aliens, 1, axis=0), jnp.where(marches, sideways, aliens))
    terminated = landed | alien_bullets[LAST, cannon] | aliens[LAST, cannon] | marched[LAST, cannon]
    move_timer = jnp.where(marches, jnp.minimum(jnp.sum(aliens), state.move_interval), state.move_timer) - 1

    shoots = state.alien_shot_timer == 0
    alien_bullets |= shoots & nearest(marched, cannon)
    shot = marched & bullets
    left = marched & ~shot
    cleared = ~jnp.any(left)
    state = State(
        cannon=cannon,
        shot_timer=counted_down(jnp.where(fires, SHOT_INTERVAL, state.shot_timer)),
        bullets=bullets & ~shot,
        aliens=jnp.where(cleared, wave(), left),
        alien_bullets=alien_bullets,
        direction=jnp.where(turns, -state.direction, state.direction),
        move_interval=state.move_interval - (cleared & (state.move_interval > SHORTEST_MOVE_INTERVAL)),
        move_timer=move_timer,
        alien_shot_timer=jnp.where(shoots, ALIEN_SHOT_INTERVAL, state.alien_shot_timer) - 1,
    )
    return state, jnp.sum(shot).astype(jnp.float32), terminated


def observe(state: State) -> jax.Array:
    """The cannon, the aliens, once more by direction, the cannon's bullets, the aliens' bullets."""
    left = state.direction < 0
    return layers(cell(state.cannon, LAST), state.aliens, state.aliens & left, state.aliens & ~left, state.bullets, state.alien_bullets)


SPACE_INVADERS = Game(
    channels=("cannon", "alien", "alien to the left", "alien to the right", "bullet", "alien bullet"),
    actions=(NOTHING, LEFT, RIGHT, FIRE),
    num_draws=0,
    reset=reset,
    advance=advance,
    observe=observe,
)
