"""MinAtar in JAX against the authors' package: recorded steps exactly, and what a recording cannot show."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete
from record_minatar import canonical, differences, read
from support import SMALL, bits

import surefoot as sf
from surefoot.collect import scan_rollout, start_stream
from surefoot.envs import make
from surefoot.envs.minatar import GAMES, MINATAR, State, asterix, freeway, seaquest
from surefoot.envs.minatar.game import below
from surefoot.spaces import encode, encoder

BATCH = SMALL.num_steps * 8


@pytest.mark.parametrize("name", GAMES)
def test_every_recorded_step_is_theirs(name):
    """From their state, with what was random for them: the state, the observation, the reward, the end."""
    steps, _ = read(name)
    assert differences(MINATAR[f"MinAtar/{name}-v0"], steps) == {}
    sticky = steps.draws[:, 0] < 0.1
    assert (sticky & (steps.last_action != steps.action)).sum() > 10
    assert (~sticky).sum() > 200
    assert steps.terminated.sum() > 5
    assert (steps.reward > 0).sum() > 20
    assert (steps.action == np.arange(6)[:, None]).any(axis=1).all()


@pytest.mark.parametrize("name", GAMES)
def test_every_recorded_reset_is_theirs(name):
    _, (draws, expected) = read(name)
    ours = jax.vmap(lambda draws: canonical(GAMES[name].reset(draws)))(draws)
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


@pytest.mark.parametrize(
    ("name", "actions", "num_channels"),
    [
        ("Asterix", [0, 1, 2, 3, 4], 4),
        ("Breakout", [0, 1, 3], 4),
        ("Freeway", [0, 2, 4], 7),
        ("Seaquest", [0, 1, 2, 3, 4, 5], 10),
        ("SpaceInvaders", [0, 1, 3, 5], 6),
    ],
)
def test_spaces_and_actions_are_theirs(name, actions, num_channels):
    everything, minimal = (make(f"MinAtar/{name}-v{version}", 2)[0] for version in (0, 1))
    for environment in (everything, minimal):
        assert environment.observation_space == Box(0.0, 1.0, (10, 10, num_channels), dtype=bool)
        assert len(environment.game.channels) == num_channels
    assert everything.action_space == Discrete(6)
    assert minimal.action_space == Discrete(len(actions))
    state, _ = minimal.reset(jax.random.key(0))
    draws = jnp.full(1 + minimal.game.num_draws, 0.5)
    for number, action in enumerate(actions):
        assert minimal.step_with(state, number, draws)[0].last_action == everything.step_with(state, action, draws)[0].last_action == action


def test_a_tenth_of_the_actions_are_sticky_and_no_key_is_used_twice():
    environment, num_envs = MINATAR["MinAtar/Breakout-v0"], 20_000
    start, _ = jax.vmap(environment.reset)(jax.random.split(jax.random.key(0), num_envs))
    once, *_ = jax.jit(jax.vmap(environment.step))(start, jnp.full(num_envs, 3))
    twice, *_ = jax.jit(jax.vmap(environment.step))(once, jnp.full(num_envs, 1))
    stuck = np.stack([once.last_action == 0, (twice.last_action != 1)])
    assert abs(stuck.mean(axis=1) - 0.1).max() < 4 * (0.09 / num_envs) ** 0.5
    both = (stuck[0] & stuck[1]).mean()
    assert abs(both - 0.01) < 4 * (0.0099 / num_envs) ** 0.5
    keys = np.concatenate([jax.random.key_data(state.key) for state in (start, once, twice)])
    assert len(np.unique(keys, axis=0)) == 3 * num_envs


def test_what_is_random_is_as_likely_as_it_should_be():
    grid = (jnp.arange(40) + 0.5) / 40
    assert np.bincount(below(grid, 8)).tolist() == [5] * 8
    assert np.unique(freeway.speeds(grid), return_counts=True)[1].tolist() == [4] * 10
    x, y, right = jax.vmap(seaquest.place)(jnp.stack(jnp.meshgrid(grid, grid), axis=-1).reshape(-1, 2))
    assert np.bincount(y).tolist() == [0] + [200] * 8
    assert (right.mean(), ((x == 0) == right).all()) == (0.5, True)
    state = asterix.reset(jnp.zeros(3))._replace(spawn_timer=jnp.int32(0), present=jnp.array([1, 0, 0, 1, 1, 0, 0, 0], bool))
    entered = jax.vmap(lambda draw: asterix.spawn(state, jnp.array([0.0, 0.0, draw])).present & ~state.present)(grid)
    assert entered.sum(axis=0).tolist() == [0, 8, 8, 0, 0, 8, 8, 8]


def test_freeway_ends_by_itself_after_2501_steps():
    environment, num_envs = MINATAR["MinAtar/Freeway-v1"], 2

    def act(obs, mask, carry, key):
        return jnp.zeros(num_envs, jnp.int32), carry

    @jax.jit
    def play(key):
        stream = start_stream(environment, num_envs, key)
        return scan_rollout(environment, act, stream, 2600, jnp.float32(0.0), key)[1]

    rollout = play(jax.random.key(0))
    assert np.flatnonzero(rollout.terminated[:, 0]).tolist() == [2500]
    assert not rollout.truncated.any()
    assert rollout.obs.dtype == bool
    assert environment.observation_space.contains(np.asarray(rollout.obs[-1, 0]))


def test_a_sea_has_room_for_as_many_enemies_as_can_be_there():
    """However the player comes up, at most at every second step, which shortens the intervals: by enumeration."""
    ramp = [(seaquest.FIRST_SPAWN_INTERVAL, seaquest.FIRST_MOVE_INTERVAL)]
    while ramp[-1] != (1, seaquest.SHORTEST_MOVE_INTERVAL):
        spawn, move = ramp[-1]
        ramp.append((max(1, spawn - 1), max(seaquest.SHORTEST_MOVE_INTERVAL, move - (len(ramp) % 2 == 0))))

    @cache
    def newer(index, spawn_timer, may_come_up, x, move_timer):
        """The most that can enter before the one that is `x` cells from its side has left."""
        spawn, move = ramp[index]
        entered = spawn_timer == 0
        if move_timer == 0 and x == 9:
            return entered
        x, move_timer = (x + 1, move) if move_timer == 0 else (x, move_timer - 1)
        spawn_timer = max(0, (spawn if entered else spawn_timer) - 1)
        following = [newer(index, spawn_timer, True, x, move_timer)]
        if may_come_up and index + 1 < len(ramp):
            following.append(newer(index + 1, spawn_timer, False, x, move_timer))
        return entered + max(following)

    most = max(
        newer(min(index + come_up, len(ramp) - 1), spawn - 1, not come_up, 0, move - 1)
        for index, (spawn, move) in enumerate(ramp)
        for come_up in (0, 1)
    )
    assert most + 1 == seaquest.NUM_ENEMIES


def test_the_player_s_bullets_and_the_divers_have_room():
    """A bullet is fired whenever one can be, and flies as far as it can; divers come as they do."""
    environment = MINATAR["MinAtar/Seaquest-v0"]
    state = environment.game.reset(jnp.zeros(5))._replace(x=jnp.int32(1), y=jnp.int32(4), right=jnp.bool_(True), oxygen=jnp.int32(9999))

    def fire(state, _):
        quiet = state._replace(spawn_timer=jnp.int32(9), x=jnp.int32(1))
        state, *_ = environment.game.advance(quiet, jnp.int32(5), jnp.full(5, 0.9))
        return state, (state.bullets.present.sum(), state.bullets.x[0], state.divers.present.sum())

    _, (num_bullets, newest, num_divers) = jax.lax.scan(fire, state, None, length=200)
    flight = np.arange(200) % 5  # a new one at every fifth step, which is in column 2 after it, and in column 9 after seven more
    np.testing.assert_array_equal(newest, 2 + flight)
    np.testing.assert_array_equal(num_bullets[5:], 1 + (flight[5:] < 3))
    entered = np.arange(200) // 30  # at step 30, 60, ...; each is there for 59 steps
    np.testing.assert_array_equal(num_divers, np.minimum(entered, 1 + ((np.arange(200) % 30) < 29) * (entered > 1)))


def test_a_network_sees_bits_as_0_and_1():
    space = MINATAR["MinAtar/Breakout-v1"].observation_space
    obs = np.asarray(MINATAR["MinAtar/Breakout-v1"].reset(jax.random.key(0))[1])
    np.testing.assert_array_equal(encode(encoder(space), obs), obs.ravel().astype(np.float32))
    assert obs.sum() == 33


def test_a_misspelt_game_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"There is no environment 'MinAtar/Brekout-v1'\. Did you mean MinAtar/Breakout-v1 or "):
        make("MinAtar/Brekout-v1", 1)


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    """The state of a game holds its generator."""
    name = "MinAtar/SpaceInvaders-v1"
    sf.train(SMALL, name, steps=3 * BATCH, out=tmp_path / "whole", progress=False)
    next(iter(sf.iterate(SMALL, name, steps=3 * BATCH, out=tmp_path / "stopped")))
    sf.resume(tmp_path / "stopped", progress=False)
    assert bits(tmp_path / "stopped") == bits(tmp_path / "whole")


def test_the_last_action_is_part_of_the_state():
    environment = MINATAR["MinAtar/Breakout-v1"]
    state, _ = environment.reset(jax.random.key(0))
    assert state.last_action == 0
    assert isinstance(state, State)
    moved, *_ = environment.step_with(state, 2, jnp.array([0.5, 0.5]))
    again, *_ = environment.step_with(moved, 1, jnp.array([0.0999, 0.5]))
    not_again, *_ = environment.step_with(moved, 1, jnp.array([0.1001, 0.5]))
    assert [int(state.game.paddle) for state in (moved, again, not_again)] == [5, 6, 4]
