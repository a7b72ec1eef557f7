"""Seaquest: a submarine that shoots fish and enemy submarines, picks up divers, and must come up for air before its oxygen is gone.

What is shot pays 1. Coming up costs a diver, and ends the game without one; six divers pay for the oxygen that is left. Each time, what
follows comes more often and moves faster. It is over, too, on contact with a fish, a submarine or its bullet.

Enemies, divers and bullets are lists, newest first: what enters pushes the others back, and as many have room as can be there at once.
The order decides which of two in one cell is hit, and by which of two bullets: the oldest of what was there before the bullet came, the
newest of what swims into one, and the oldest bullet of those in a cell.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .game import (
    DOWN,
    FIRE,
    LAST,
    LEFT,
    NOTHING,
    RIGHT,
    SIZE,
    UP,
    Game,
    Outcome,
    ahead,
    below,
    cell,
    counted_down,
    integers,
    is_off,
    layers,
    moved,
)

OXYGEN = 200  # steps
SEATS = 6  # for divers
DEEPEST = 8  # row; in row 9 are the gauges
SHOT_INTERVAL = 5  # steps between two of the player's shots
ENEMY_SHOT_INTERVAL = 10
FIRST_SPAWN_INTERVAL, DIVER_SPAWN_INTERVAL = 20, 30
FIRST_MOVE_INTERVAL, SHORTEST_MOVE_INTERVAL = 5, 2
DIVER_MOVE_INTERVAL = 5
# An enemy that enters at every step, at the shortest interval, leaves as the thirtieth comes; of bullets, fired at every fifth step
# and gone after nine, and of divers, every thirtieth step and gone after 59, there are two.
NUM_ENEMIES, NUM_DIVERS, NUM_BULLETS = 30, 2, 2


class Enemies(NamedTuple):
    """Fish and submarines [30], newest first."""

    present: jax.Array  # bool
    submarine: jax.Array  # bool
    x: jax.Array
    y: jax.Array
    right: jax.Array  # bool: it moves to the right
    move_timer: jax.Array
    shot_timer: jax.Array  # of submarines


class Divers(NamedTuple):
    """[2], newest first."""

    present: jax.Array  # bool
    x: jax.Array
    y: jax.Array
    right: jax.Array  # bool
    move_timer: jax.Array


class Bullets(NamedTuple):
    """The player's [2], newest first."""

    present: jax.Array  # bool
    x: jax.Array
    y: jax.Array
    right: jax.Array  # bool


class State(NamedTuple):
    """Everything that moves, the stores and the clocks; int32 where nothing else is said."""

    x: jax.Array
    y: jax.Array
    right: jax.Array  # bool: the player faces to the right
    surfaced: jax.Array  # bool: it has come up, and has not dived since
    oxygen: jax.Array
    divers_aboard: jax.Array  # -1 and less when it has come up with six, and more often: the original counts on
    bullets: Bullets
    enemies: Enemies
    divers: Divers
    bullets_left: jax.Array  # [10, 10] bool: enemies' bullets that fly to the left
    bullets_right: jax.Array  # [10, 10] bool
    shot_timer: jax.Array
    spawn_interval: jax.Array
    spawn_timer: jax.Array
    diver_timer: jax.Array
    move_interval: jax.Array
    ramp_index: jax.Array  # increases of the difficulty so far


def reset(draws: jax.Array) -> State:
    """The player at the surface of an empty sea."""

    def flags(size: int) -> jax.Array:
        return jnp.zeros(size, bool)

    def numbers(size: int) -> jax.Array:
        return jnp.zeros(size, jnp.int32)

    n, d, b = NUM_ENEMIES, NUM_DIVERS, NUM_BULLETS
    clocks = integers(
        shot_timer=0,
        spawn_interval=FIRST_SPAWN_INTERVAL,
        spawn_timer=FIRST_SPAWN_INTERVAL,
        diver_timer=DIVER_SPAWN_INTERVAL,
        move_interval=FIRST_MOVE_INTERVAL,
        ramp_index=0,
    )
    return State(
        **integers(x=5, y=0, oxygen=OXYGEN, divers_aboard=0),
        right=jnp.bool_(False),
        surfaced=jnp.bool_(True),
        bullets=Bullets(flags(b), numbers(b), numbers(b), flags(b)),
        enemies=Enemies(flags(n), flags(n), numbers(n), numbers(n), flags(n), numbers(n), numbers(n)),
        divers=Divers(flags(d), numbers(d), numbers(d), flags(d), numbers(d)),
        bullets_left=jnp.zeros((SIZE, SIZE), bool),
        bullets_right=jnp.zeros((SIZE, SIZE), bool),
        **clocks,
    )


def enter(things: Any, newest: Any, when: jax.Array) -> Any:
    """`things` with `newest` before them `when` it enters; the last drops out."""
    return jax.tree.map(lambda all_of_them, one: jnp.where(when, jnp.roll(all_of_them, 1).at[0].set(one), all_of_them), things, newest)


def first(among: jax.Array) -> jax.Array:
    """The newest of those that `among` [n] has."""
    return among & (jnp.arange(len(among)) == jnp.argmax(among))


def place(draws: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(x, y, right) of what enters: at the left or the right of one of the rows 1 to 8. Two draws."""
    right = draws[0] < 1 / 2
    return jnp.where(right, 0, LAST), 1 + below(draws[1], DEEPEST), right


def spawn(state: State, draws: jax.Array) -> State:
    """Enemies and divers enter when it is time, but no enemy against the others in its row. Draws: both places, and which enemy."""
    is_time, is_time_for_diver = state.spawn_timer == 0, state.diver_timer == 0
    x, y, right = place(draws[:2])
    enemies = state.enemies
    against = jnp.any(enemies.present & (enemies.y == y) & (enemies.right != right))
    enemy = Enemies(is_time, draws[4] < 1 / 3, x, y, right, state.move_interval, jnp.int32(ENEMY_SHOT_INTERVAL))
    diver = Divers(is_time_for_diver, *place(draws[2:4]), jnp.int32(DIVER_MOVE_INTERVAL))
    return state._replace(
        enemies=enter(enemies, enemy, is_time & ~against),
        divers=enter(state.divers, diver, is_time_for_diver),
        spawn_timer=jnp.where(is_time, state.spawn_interval, state.spawn_timer),
        diver_timer=jnp.where(is_time_for_diver, DIVER_SPAWN_INTERVAL, state.diver_timer),
    )


def steer(state: State, action: jax.Array) -> State:
    """Move and turn the player, or fire."""
    fires = (action == FIRE) & (state.shot_timer == 0)
    bullet = Bullets(fires, state.x, state.y, state.right)
    return state._replace(
        x=moved(state.x, action, LEFT, RIGHT),
        y=moved(state.y, action, UP, DOWN, 0, DEEPEST),
        right=(state.right | (action == RIGHT)) & (action != LEFT),
        bullets=enter(state.bullets, bullet, fires),
        shot_timer=jnp.where(fires, SHOT_INTERVAL, state.shot_timer),
    )


def fly(bullets: Bullets, enemies: Enemies) -> tuple[Bullets, Enemies, jax.Array]:
    """The player's bullets move, and each takes an enemy from its new cell, fish first: (bullets, enemies, how many were hit)."""
    x = jnp.where(bullets.present, bullets.x + ahead(bullets.right), bullets.x)
    present, alive = bullets.present & ~is_off(x), enemies.present
    age = jnp.arange(NUM_ENEMIES) + jnp.where(enemies.submarine, 0, NUM_ENEMIES)
    num_hits = jnp.int32(0)
    for k in range(NUM_BULLETS):
        there = alive & present[k] & (enemies.x == x[k]) & (enemies.y == bullets.y[k])
        alive &= ~(there & (age == jnp.max(jnp.where(there, age, -1))))
        is_hit = jnp.any(there)
        present, num_hits = present.at[k].set(present[k] & ~is_hit), num_hits + is_hit
    return bullets._replace(present=present, x=x), enemies._replace(present=alive), num_hits


def pick_up(state: State) -> tuple[Divers, jax.Array]:
    """Divers swim, and come aboard where they meet the player and there is a seat: (divers, how many are aboard)."""
    divers = state.divers
    moves = divers.present & (divers.move_timer == 0)
    x = jnp.where(moves, divers.x + ahead(divers.right), divers.x)
    meet = divers.present & (divers.y == state.y) & ((divers.x == state.x) | (x == state.x))
    before = jnp.cumsum(meet) - meet
    boards = meet & (state.divers_aboard + before < SEATS)
    timer = jnp.where(moves, DIVER_MOVE_INTERVAL, divers.move_timer - 1)
    return divers._replace(present=divers.present & ~boards & ~is_off(x), x=x, move_timer=timer), state.divers_aboard + jnp.sum(boards)


def swim(state: State, kind: jax.Array) -> tuple[State, jax.Array, jax.Array]:
    """The enemies of a `kind` [30] move when it is time: (state, how many ran into bullets, whether one met the player)."""
    enemies, bullets = state.enemies, state.bullets
    kind = kind & enemies.present
    moves = kind & (enemies.move_timer == 0)
    x = jnp.where(moves, enemies.x + ahead(enemies.right), enemies.x)
    in_row = kind & (enemies.y == state.y)
    meets = jnp.any(in_row & ((enemies.x == state.x) | (x == state.x)))

    exposed, loaded = moves & ~(in_row & (x == state.x)), bullets.present
    hit = jnp.zeros_like(moves)
    for k in reversed(range(NUM_BULLETS)):
        runs_into = first(exposed & ~hit & loaded[k] & (x == bullets.x[k]) & (enemies.y == bullets.y[k]))
        hit |= runs_into
        loaded = loaded.at[k].set(loaded[k] & ~jnp.any(runs_into))
    timer = jnp.where(moves, state.move_interval, enemies.move_timer - 1)
    enemies = enemies._replace(
        present=enemies.present & ~hit & ~(moves & is_off(x)), x=x, move_timer=jnp.where(kind, timer, enemies.move_timer)
    )
    return state._replace(enemies=enemies, bullets=bullets._replace(present=loaded)), jnp.sum(hit), meets


def shoot(state: State, submarines: jax.Array) -> tuple[State, jax.Array]:
    """The `submarines` [30] shoot when it is time, hit or not, and their bullets fly: (state, whether one hits the player)."""
    enemies, player = state.enemies, cell(state.x, state.y)
    fires = submarines & (enemies.shot_timer == 0)
    left = state.bullets_left | board(enemies.x, enemies.y, fires & ~enemies.right)
    right = state.bullets_right | board(enemies.x, enemies.y, fires & enemies.right)
    edge = jnp.zeros((SIZE, 1), bool)
    flown_left = jnp.concatenate([left[:, 1:], edge], axis=1)
    flown_right = jnp.concatenate([edge, right[:, :-1]], axis=1)
    timer = jnp.where(fires, ENEMY_SHOT_INTERVAL, enemies.shot_timer - submarines)
    state = state._replace(enemies=enemies._replace(shot_timer=timer), bullets_left=flown_left, bullets_right=flown_right)
    return state, jnp.any(player & (left | right | flown_left | flown_right))


def breathe(state: State) -> tuple[State, jax.Array, jax.Array]:
    """Use oxygen, or come up: (state, reward, whether that was the end)."""
    dives, comes_up = state.y > 0, (state.y == 0) & ~state.surfaced
    suffocates, is_alone = state.oxygen <= 0, comes_up & (state.divers_aboard == 0)
    lands = comes_up & ~is_alone
    is_full = lands & (state.divers_aboard == SEATS)
    reward = jnp.where(is_full, state.oxygen * 10 // OXYGEN, 0)
    harder = lands & ((state.spawn_interval > 1) | (state.move_interval > SHORTEST_MOVE_INTERVAL))
    faster = harder & (state.move_interval > SHORTEST_MOVE_INTERVAL) & (state.ramp_index % 2 == 1)
    state = state._replace(
        surfaced=(state.surfaced | lands) & ~dives,
        oxygen=jnp.where(lands, OXYGEN, state.oxygen - dives),
        divers_aboard=jnp.where(is_full, 0, state.divers_aboard) - lands,
        spawn_interval=state.spawn_interval - (harder & (state.spawn_interval > 1)),
        move_interval=state.move_interval - faster,
        ramp_index=state.ramp_index + harder,
    )
    return state, reward, suffocates | is_alone


def advance(state: State, action: jax.Array, draws: jax.Array) -> Outcome:
    """What may enters, then all move: the player, its bullets, divers, submarines, their bullets, fish. Last is the air."""
    state = steer(spawn(state, draws), action)
    bullets, enemies, num_shot = fly(state.bullets, state.enemies)
    divers, divers_aboard = pick_up(state)
    state = state._replace(bullets=bullets, enemies=enemies, divers=divers, divers_aboard=divers_aboard)
    submarines = enemies.present & enemies.submarine
    state, num_submarines, meets_submarine = swim(state, submarines)
    state, meets_bullet = shoot(state, submarines)
    state, num_fish, meets_fish = swim(state, ~enemies.submarine)
    state = state._replace(
        spawn_timer=counted_down(state.spawn_timer), diver_timer=counted_down(state.diver_timer), shot_timer=counted_down(state.shot_timer)
    )
    state, reward, is_over = breathe(state)
    reward += num_shot + num_submarines + num_fish
    return state, reward.astype(jnp.float32), meets_submarine | meets_bullet | meets_fish | is_over


def board(x: jax.Array, y: jax.Array, present: jax.Array) -> jax.Array:
    """[10, 10] bool: the cells (x, y) [n] of what is present; what is one cell off the board is not shown.

    A row is a number with a bit for each column, so that n things are gathered in 10 n operations and not in 100 n.
    """
    bits = jnp.where(present & (y == jnp.arange(SIZE)[:, None]), 1 << (x + 1), 0)
    return (jax.lax.reduce_or(bits, (1,))[:, None] >> jnp.arange(1, SIZE + 1)) & 1 == 1


def observe(state: State) -> jax.Array:
    """The player's front and back, its bullets, the cells behind all that swims, bullets, fish, submarines, gauges, divers."""
    enemies, divers, bullets = state.enemies, state.divers, state.bullets
    behind, behind_divers = enemies.x - ahead(enemies.right), divers.x - ahead(divers.right)
    columns, gauges = jnp.arange(SIZE), jnp.arange(SIZE)[:, None] == LAST
    return layers(
        cell(state.x, state.y),
        cell(state.x - ahead(state.right), state.y),
        board(bullets.x, bullets.y, bullets.present),
        board(behind, enemies.y, enemies.present) | board(behind_divers, divers.y, divers.present),
        state.bullets_left | state.bullets_right,
        board(enemies.x, enemies.y, enemies.present & ~enemies.submarine),
        board(enemies.x, enemies.y, enemies.present & enemies.submarine),
        gauges & (columns < jnp.maximum(state.oxygen, 0) * 10 // OXYGEN),
        gauges & (columns >= LAST - state.divers_aboard) & (columns < LAST),
        board(divers.x, divers.y, divers.present),
    )


SEAQUEST = Game(
    channels=("front", "back", "bullet", "trail", "enemy bullet", "fish", "submarine", "oxygen gauge", "diver gauge", "diver"),
    actions=(NOTHING, LEFT, UP, RIGHT, DOWN, FIRE),
    num_draws=5,
    reset=reset,
    advance=advance,
    observe=observe,
)
