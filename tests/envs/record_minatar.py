"""Plays the authors' MinAtar and writes down what it does, for `test_minatar.py`, or holds ours to it step by step for as long as you like.

    pip install --no-deps minatar==1.0.15
    python tests/envs/record_minatar.py                     writes tests/envs/minatar/*.safetensors
    python tests/envs/record_minatar.py --compare 200000    this many steps of each game, nothing written

Play is random and scripted by turns, from resets and from states that would take long to reach: few bricks or aliens, late waves, high
difficulty, little oxygen, little time. A state of theirs is told as one of ours, what was random as the numbers in [0, 1) that lead
ours to the same. Every line and branch of theirs that play reached is in the recording several times.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from surefoot.envs.minatar import MINATAR, MinAtar, State, asterix, breakout, freeway, seaquest, space_invaders
from surefoot.envs.minatar.game import DOWN, FIRE, LEFT, NOTHING, RIGHT, UP

VERSION = "1.0.15"
FOLDER = Path(__file__).parent / "minatar"
# Ours by theirs, and how many recorded steps keep a file small.
THEIRS = {"Asterix": "asterix", "Breakout": "breakout", "Freeway": "freeway", "Seaquest": "seaquest", "SpaceInvaders": "space_invaders"}
RECORDED = {"Asterix": 900, "Breakout": 700, "Freeway": 500, "Seaquest": 520, "SpaceInvaders": 700}
RESETS = 30
CLIP = 6  # steps in a row that are recorded together
TIMES = 8  # that a branch is recorded, if it was reached as often
Rng = np.random.Generator


class Steps(NamedTuple):
    """K steps from given states, and what came of them."""

    before: Any  # State [K, ...] of a game, `canonical`
    last_action: np.ndarray  # [K]
    action: np.ndarray  # [K] one of all six
    draws: np.ndarray  # [K, 1 + num_draws] float32
    after: Any  # State [K, ...]
    obs: np.ndarray  # [K, 10, 10, C] bool
    reward: np.ndarray  # [K] float32
    terminated: np.ndarray  # [K] bool


# Ours


def canonical(state: Any) -> Any:
    """`state` of a game with lists in one order, nothing left of what is not there, and no timers that nothing reads."""

    def in_order(things: Any, rank: Any) -> Any:
        order = jnp.argsort(jnp.where(things.present, rank, 2), stable=True)
        return jax.tree.map(lambda leaf: (leaf * things.present)[order], things)

    match state:
        case asterix.State():
            return state._replace(**{name: getattr(state, name) * state.present for name in ("x", "right", "gold")})
        case seaquest.State():
            enemies = state.enemies._replace(shot_timer=state.enemies.shot_timer * state.enemies.submarine)
            # Fish and submarines are two lists of theirs, each gone through on its own.
            return state._replace(
                enemies=in_order(enemies, jnp.where(enemies.submarine, 0, 1)),
                divers=in_order(state.divers, 0),
                bullets=in_order(state.bullets, 0),
            )
    return state


def our_steps(environment: MinAtar, steps: Steps) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
    """(state, observation, reward, terminated) of ours after the same, all [K, ...]."""
    return jax.device_get(compiled(environment)(steps.before, steps.last_action, steps.action, steps.draws))


def compiled(environment: MinAtar) -> Any:
    """`our_steps` as one program for a number of steps."""

    def step(before: Any, last_action: jax.Array, action: jax.Array, draws: jax.Array) -> Any:
        state, *outcome = environment.step_with(State(before, last_action, jax.random.key(0)), action, draws)
        return canonical(state.game), *outcome

    if environment not in _programs:
        _programs[environment] = jax.jit(jax.vmap(step))
    return _programs[environment]


_programs: dict[MinAtar, Any] = {}


def differences(environment: MinAtar, steps: Steps) -> dict[str, np.ndarray]:
    """For every part of the outcome that is not equal everywhere, the steps at which it is not."""
    state, obs, reward, terminated = our_steps(environment, steps)
    pairs = {".".join(key.name for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    expected = {".".join(key.name for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(steps.after)}
    pairs |= {"obs": obs, "reward": reward, "terminated": terminated}
    expected |= {"obs": steps.obs, "reward": steps.reward, "terminated": steps.terminated}
    assert pairs.keys() == expected.keys()
    differ = {name: (np.asarray(ours) != expected[name]).reshape(len(ours), -1).any(axis=1) for name, ours in pairs.items()}
    return {name: np.flatnonzero(where) for name, where in differ.items() if where.any()}


# Files


def write(name: str, steps: Steps, resets: tuple[np.ndarray, Any]) -> Path:
    """Small integers, bits packed by eight."""
    arrays, info = {}, {"package": f"minatar=={VERSION}", "command": "python tests/envs/record_minatar.py"}
    for path, leaf in jax.tree_util.tree_leaves_with_path({"steps": steps._asdict(), "resets": resets}):
        leaf = np.asarray(leaf)
        if leaf.dtype == bool:
            leaf = np.packbits(leaf.reshape(len(leaf), -1), axis=1)
        elif leaf.dtype.kind == "i":
            leaf = leaf.astype(np.min_scalar_type(-max(1, np.abs(leaf).max())))
        arrays[jax.tree_util.keystr(path)] = np.ascontiguousarray(leaf)
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.safetensors"
    save_file(arrays, path, info)
    return path


def read(name: str) -> tuple[Steps, tuple[np.ndarray, Any]]:
    """(recorded steps, (draws [R, num_draws], State [R, ...]) of recorded resets)"""
    game, arrays = MINATAR[f"MinAtar/{name}-v0"].game, load_file(FOLDER / f"{name}.safetensors")
    draws = np.zeros(game.num_draws, np.float32)
    state = template(name)
    obs = jax.ShapeDtypeStruct((10, 10, len(game.channels)), bool)
    number, flag = jax.ShapeDtypeStruct((), np.int32), jax.ShapeDtypeStruct((), bool)
    chance = jax.ShapeDtypeStruct((1 + game.num_draws,), np.float32)
    steps = Steps(state, number, number, chance, state, obs, jax.ShapeDtypeStruct((), np.float32), flag)

    def leaf(path: Any, like: Any) -> np.ndarray:
        stored = arrays[jax.tree_util.keystr(path)]
        if like.dtype == bool:
            stored = np.unpackbits(stored, axis=1, count=int(np.prod(like.shape)))
        return stored.reshape(len(stored), *like.shape).astype(like.dtype)

    layout = {"steps": steps._asdict(), "resets": (jax.ShapeDtypeStruct(draws.shape, draws.dtype), state)}
    found = jax.tree_util.tree_map_with_path(leaf, layout)
    return Steps(**found["steps"]), found["resets"]


# Theirs, told as ours


class Dice:
    """Their generator, which remembers what it gave."""

    def __init__(self, seed: int):
        self.random, self.given = np.random.RandomState(seed), []

    def rand(self, *shape: int) -> Any:
        self.given.append(self.random.rand(*shape))
        return self.given[-1]

    def randint(self, *arguments: Any, **options: Any) -> Any:
        self.given.append(self.random.randint(*arguments, **options))
        return np.copy(self.given[-1]) if np.ndim(self.given[-1]) else self.given[-1]  # they write into what they get


def middle(value: float, threshold: float) -> float:
    """A number on the same side of the threshold, far from it."""
    return threshold / 2 if value < threshold else (1 + threshold) / 2


def among(index: int, count: int) -> float:
    return (index + 0.5) / count


def game_draws(name: str, game: Any, given: list[Any], spare: np.ndarray) -> np.ndarray:
    """What their game drew in a step, as the numbers from which ours draws the same; `spare` where it drew nothing."""
    draws = spare.copy()
    if not given:
        return draws
    if name == "Breakout":
        draws[0] = among(given[0], 2)
    elif name == "Asterix":
        draws[:2] = middle(given[0], 1 / 2), middle(given[1], 1 / 3)
        if len(given) == 3:
            draws[2] = among(given[2], game)  # of as many free rows
    elif name == "Freeway":
        speed, side = np.asarray(given[0]), given[1] - 0.5
        draws[:] = [among(s - 1 if positive else 4 + s, 10) for s, positive in zip(speed, side > 0, strict=True)]
    elif name == "Seaquest":
        if len(given) in (3, 5):
            right, kind, row = given[:3]
            draws[[0, 4, 1]] = middle(right, 1 / 2), middle(kind, 1 / 3), among(row - 1, 8)
        if len(given) in (2, 5):
            right, row = given[-2:]
            draws[[2, 3]] = middle(right, 1 / 2), among(row - 1, 8)
    return draws


def newest_first(rows: list[Any], size: int, width: int) -> list[np.ndarray]:
    """(present [size], the columns of `rows` [size]) of a list whose newest is last."""
    assert len(rows) <= size, f"{len(rows)} where {size} have room"
    table = np.zeros((size, width), np.int32)
    table[: len(rows)] = np.array(rows[::-1], np.int32).reshape(len(rows), width)
    return [np.arange(size) < len(rows), *table.T]


def told(name: str, env: Any) -> Any:
    """The state of their game as one of ours."""
    match name:
        case "Breakout":
            toward = {0: (-1, -1), 1: (1, -1), 2: (1, 1), 3: (-1, 1)}[env.ball_dir]
            values = (env.pos, env.ball_x, env.ball_y, *toward, env.last_x, env.last_y, env.strike, env.brick_map > 0)
            state = breakout.State(*values)
        case "Asterix":
            entities = [(1, *entity[:1], *entity[2:]) if entity else (0, 0, 0, 0) for entity in env.entities]
            clocks = (env.spawn_speed, env.spawn_timer, env.move_speed, env.move_timer, env.ramp_timer, env.ramp_index)
            state = asterix.State(env.player_x, env.player_y, *np.array(entities, np.int32).T, *clocks)
        case "Freeway":
            x, y, timer, speed = np.array(env.cars, np.int32).T
            assert (y == np.arange(1, 9)).all()
            state = freeway.State(env.pos, env.move_timer, x, timer, speed, env.terminate_timer)
        case "SpaceInvaders":
            assert env.ramp_index == 12 - env.enemy_move_interval
            boards = (env.f_bullet_map > 0, env.alien_map > 0, env.e_bullet_map > 0)
            clocks = (env.enemy_move_interval, env.alien_move_timer, env.alien_shot_timer)
            state = space_invaders.State(env.pos, env.shot_timer, *boards, env.alien_dir, *clocks)
        case "Seaquest":
            state = told_seaquest(env)
    return jax.tree.map(lambda leaf, ours: np.asarray(leaf).astype(ours.dtype), state, template(name))


@cache
def template(name: str) -> Any:
    """Shapes of a game's state."""
    game = MINATAR[f"MinAtar/{name}-v0"].game
    return jax.eval_shape(lambda: canonical(game.reset(jnp.zeros(game.num_draws))))


def told_seaquest(env: Any) -> seaquest.State:
    def swimmers(rows: list[Any], kind: int) -> list[Any]:
        return [(kind, *row, *([0] if kind == 0 else [])) for row in rows]

    present, submarine, x, y, right, move_timer, shot_timer = newest_first(
        swimmers(env.e_fish, 0) + swimmers(env.e_subs, 1), seaquest.NUM_ENEMIES, 6
    )
    flying = np.zeros((2, 10, 10), bool)
    for bullet_x, bullet_y, to_right in env.e_bullets:
        flying[int(to_right), bullet_y, bullet_x] = True
    return seaquest.State(
        x=env.sub_x,
        y=env.sub_y,
        right=env.sub_or,
        surfaced=env.surface,
        oxygen=env.oxygen,
        divers_aboard=env.diver_count,
        bullets=seaquest.Bullets(*newest_first(env.f_bullets, seaquest.NUM_BULLETS, 3)),
        enemies=seaquest.Enemies(present, submarine, x, y, right, move_timer, shot_timer),
        divers=seaquest.Divers(*newest_first(env.divers, seaquest.NUM_DIVERS, 4)),
        bullets_left=flying[0],
        bullets_right=flying[1],
        shot_timer=env.shot_timer,
        spawn_interval=env.e_spawn_speed,
        spawn_timer=env.e_spawn_timer,
        diver_timer=env.d_spawn_timer,
        move_interval=env.move_speed,
        ramp_index=env.ramp_index,
    )


# Play


def start(name: str, game: Any, rng: Rng) -> None:
    """A new episode, every other one from a state that would take long to reach."""
    game.reset()
    if rng.random() < 0.5:
        return
    match name:
        case "Breakout":
            game.brick_map[1:4] *= rng.random((3, 10)) < rng.choice([0.0, 0.05, 0.3, 0.7])
        case "Asterix":
            for _ in range(rng.integers(12)):  # as the game does it
                if game.spawn_speed > 1 or game.move_speed > 1:
                    game.move_speed -= game.move_speed > 1 and game.ramp_index % 2
                    game.spawn_speed -= game.spawn_speed > 1
                    game.ramp_index += 1
            game.spawn_timer, game.move_timer = (int(rng.integers(high + 1)) for high in (game.spawn_speed, game.move_speed))
            game.ramp_timer = int(rng.integers(-1, 101))
        case "Freeway":
            game.terminate_timer, game.pos = int(rng.choice([0, 40, 2500])), int(rng.integers(1, 10))
        case "SpaceInvaders":
            waves = int(rng.integers(9))
            game.enemy_move_interval, game.ramp_index = 12 - min(waves, 6), min(waves, 6)
            game.alien_map *= rng.random((10, 10)) < rng.choice([0.1, 0.5, 1.0])
            game.alien_map[int(rng.integers(4)), int(rng.integers(2, 8))] = 1
            game.alien_map = np.roll(game.alien_map, int(rng.integers(7)), axis=0)
        case "Seaquest":
            for _ in range(rng.integers(22)):
                if game.e_spawn_speed > 1 or game.move_speed > 2:
                    game.move_speed -= game.move_speed > 2 and game.ramp_index % 2
                    game.e_spawn_speed -= game.e_spawn_speed > 1
                    game.ramp_index += 1
            game.e_spawn_timer = int(rng.integers(game.e_spawn_speed + 1))
            game.d_spawn_timer = int(rng.integers(31))
            game.diver_count = int(rng.choice([-1, 0, 1, 2, 5, 6], p=[0.3, 0.1, 0.1, 0.1, 0.2, 0.2]))
            game.oxygen = int(rng.choice([1, 10, 60, 200]))


def towards(x: int, target: int) -> int:
    return LEFT if target < x else RIGHT if target > x else NOTHING


def player(name: str, rng: Rng) -> Any:
    """What plays an episode, at random or by a script: game -> action."""
    noise = rng.choice([0.02, 0.2, 1.0], p=[0.4, 0.3, 0.3])
    mood = rng.integers(3)

    def script(game: Any) -> int:
        match name:
            case "Breakout":
                return towards(game.pos, game.ball_x)
            case "Asterix":
                return asterix_script(game)
            case "Freeway":
                return UP
            case "SpaceInvaders":
                if mood == 0:  # let them land
                    return towards(game.pos, 9 if game.alien_dir < 0 else 0)
                columns = np.flatnonzero(game.alien_map.any(axis=0))
                target = columns[np.argmin(abs(columns - game.pos))]
                return FIRE if game.shot_timer == 0 and abs(target - game.pos) < 2 else towards(game.pos, int(target))
            case _:
                return seaquest_script(game, mood)

    return lambda game: int(rng.integers(6)) if rng.random() < noise else script(game)


def asterix_script(game: Any) -> int:
    """Away from enemies that come near, else towards gold."""
    x, y = game.player_x, game.player_y

    def danger(x: int, y: int) -> float:
        entity = game.entities[y - 1]
        if entity is None:
            return 0.0
        gap = (x - entity[0]) * (1 if entity[2] else -1)
        return -1.0 / (1 + abs(gap)) if entity[3] else (2.0 if 0 <= gap <= 2 else 0.0)

    places = {NOTHING: (x, y), LEFT: (max(0, x - 1), y), UP: (x, max(1, y - 1)), RIGHT: (min(9, x + 1), y), DOWN: (x, min(8, y + 1))}
    return min(places, key=lambda action: danger(*places[action]))


def seaquest_script(game: Any, mood: int) -> int:
    """Shoot what is ahead; fetch divers and bring them up; or bob at the surface, which makes it hard."""
    ahead = 1 if game.sub_or else -1
    targets = [thing for thing in game.e_fish + game.e_subs if thing[1] == game.sub_y]
    if game.shot_timer == 0 and any((thing[0] - game.sub_x) * ahead > 0 for thing in targets):
        return FIRE
    if mood == 0 and game.diver_count:
        return DOWN if game.sub_y == 0 else UP
    if targets and mood == 1:
        return towards(game.sub_x, targets[0][0])
    if game.divers and game.diver_count < 6:
        x, y, *_ = game.divers[0]
        return DOWN if y > game.sub_y else UP if y < game.sub_y else towards(game.sub_x, x)
    return UP if game.diver_count > 3 or game.oxygen < 20 else DOWN if game.sub_y < 4 else FIRE


class Tracer:
    """Which lines of their games were run, each with the line before it."""

    def __init__(self) -> None:
        self.arcs: set[tuple[str, int, int]] = set()

    def __enter__(self) -> Tracer:
        sys.settrace(self.call)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(None)

    def call(self, frame: Any, event: str, argument: Any) -> Any:
        file, before = frame.f_code.co_filename, 0
        if "minatar" not in file or "environment" not in file:
            return None

        def line(frame: Any, event: str, argument: Any) -> Any:
            nonlocal before
            if event == "line":
                self.arcs.add((Path(file).name, before, before := frame.f_lineno))
            return line

        return line


def play(name: str, num_steps: int, seed: int, *, traced: bool) -> Iterator[tuple[tuple[Any, ...], bool, set[Any]]]:
    """(the fields of `Steps` for one step, whether it begins an episode, the branches of theirs that it went through)"""
    from minatar import Environment

    rng, dice = np.random.default_rng(seed), Dice(seed)
    env = Environment(THEIRS[name])
    env.random = env.env.random = dice
    num_draws, begins, act = MINATAR[f"MinAtar/{name}-v0"].game.num_draws, True, None
    for _ in range(num_steps):
        if begins:
            start(name, env.env, rng)
            act = player(name, rng)
            before = told(name, env.env)
        action, last_action, dice.given = act(env.env), env.last_action, []
        count = sum(entity is None for entity in env.env.entities) if name == "Asterix" else 0
        with Tracer() if traced else nullcontext(Tracer()) as tracer:
            reward, terminated = env.act(action)
        sticky, *given = dice.given
        spare = rng.random(num_draws, np.float32)
        draws = np.array([middle(sticky, 0.1), *game_draws(name, count, given, spare)], np.float32)
        after, obs = told(name, env.env), env.state()
        yield (before, last_action, action, draws, after, obs, np.float32(reward), terminated), begins, tracer.arcs
        before, begins = after, terminated


def stacked(rows: list[tuple[Any, ...]]) -> Steps:
    return Steps(*(jax.tree.map(lambda *leaves: np.stack(leaves), *column) for column in zip(*rows, strict=True)))


def record(name: str, seed: int = 0) -> None:
    """Clips of play: those that show a branch not yet shown `TIMES` times, then any."""
    clips: list[tuple[list[tuple[Any, ...]], set[Any]]] = []
    for row, begins, arcs in play(name, 20_000, seed, traced=True):
        if begins or len(clips[-1][0]) == CLIP:
            clips.append(([], set()))
        clips[-1][0].append(row)
        clips[-1][1].update(arcs)
    shown, kept, order = Counter(), [], np.random.default_rng(seed).permutation(len(clips))
    rare = Counter(arc for _, arcs in clips for arc in arcs)
    for index in sorted(order, key=lambda index: min(rare[arc] for arc in clips[index][1])):
        rows, arcs = clips[index]
        if any(shown[arc] < TIMES for arc in arcs):
            shown.update(arcs)
            kept.append(rows)
    missed = rare.keys() - shown.keys()
    assert not missed
    fill = (clips[index][0] for index in order)
    while sum(map(len, kept)) < RECORDED[name]:
        kept.append(next(fill))
    steps = stacked([row for rows in kept for row in rows])
    path = write(name, steps, resets(name, seed))
    print(f"{path.name}: {len(steps.action)} steps, {len(shown)} branches, {path.stat().st_size / 1e3:.0f} kB", flush=True)


def resets(name: str, seed: int) -> tuple[np.ndarray, Any]:
    """(draws [R, num_draws], State [R, ...]) of first states."""
    from minatar import Environment

    rng, dice = np.random.default_rng(seed), Dice(seed)
    env = Environment(THEIRS[name])
    env.env.random = dice
    draws, states = [], []
    for _ in range(RESETS):
        dice.given = []
        env.reset()
        spare = rng.random(MINATAR[f"MinAtar/{name}-v0"].game.num_draws, np.float32)
        draws.append(game_draws(name, 0, dice.given, spare))
        states.append(told(name, env.env))
    return np.stack(draws), jax.tree.map(lambda *leaves: np.stack(leaves), *states)


def compare(name: str, num_steps: int, seed: int = 1, chunk: int = 5_000) -> None:
    """Every step from their state, and every episode from its first state alone."""
    environment, rows, firsts = MINATAR[f"MinAtar/{name}-v0"], [], []
    totals: Counter[str] = Counter()
    for row, begins, _ in play(name, num_steps, seed, traced=False):
        rows.append(row)
        firsts.append(begins)
        if len(rows) == chunk:
            totals.update(compared(environment, stacked(rows), np.array(firsts)))
            rows, firsts = [], []
    print(f"{name}: {dict(totals)}", flush=True)


def compared(environment: MinAtar, steps: Steps, firsts: np.ndarray) -> dict[str, int]:
    differ = differences(environment, steps)
    if differ:
        raise SystemExit(f"{environment.name} differs: " + ", ".join(f"{part} at {where[:5]}" for part, where in differ.items()))

    def follow(game: Any, row: tuple[Any, ...]) -> tuple[Any, Any]:
        begins, before, last_action, action, draws = row
        game = jax.tree.map(lambda new, old: jnp.where(begins, new, old), before, game)
        state, *outcome = environment.step_with(State(game, last_action, jax.random.key(0)), action, draws)
        return state.game, (canonical(state.game), *outcome)

    first = jax.tree.map(lambda leaf: leaf[0], steps.before)
    if environment not in _followers:
        _followers[environment] = jax.jit(partial(jax.lax.scan, follow))
    _, outcome = _followers[environment](first, (firsts, steps.before, steps.last_action, steps.action, steps.draws))
    for ours, expected in zip(jax.tree.leaves(outcome), jax.tree.leaves(steps[4:]), strict=True):
        np.testing.assert_array_equal(ours, expected)
    return {
        "steps": len(firsts),
        "episodes": int(firsts.sum()),
        "reward": int(steps.reward.sum()),
        "terminated": int(steps.terminated.sum()),
        "sticky": int((steps.draws[:, 0] < 0.1).sum()),
    }


_followers: dict[MinAtar, Any] = {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", type=int, metavar="STEPS", help="hold ours to this many steps of each game; nothing is written")
    parser.add_argument("games", nargs="*", default=list(THEIRS), metavar="GAME", help=f"some of {', '.join(THEIRS)}; all by default")
    options = parser.parse_args()
    installed = importlib.metadata.version("minatar")
    if installed != VERSION:
        raise SystemExit(f"This is about minatar {VERSION}, and {installed} is installed: pip install --no-deps minatar=={VERSION}")
    logging.disable(logging.WARNING)  # that it will not draw without seaborn
    for name in options.games:
        if options.compare:
            compare(name, options.compare)
        else:
            record(name)


if __name__ == "__main__":
    main()
