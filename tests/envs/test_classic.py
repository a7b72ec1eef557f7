"""Classic control against Gymnasium: one step from chosen states, in float64 exactly and in float32 to rounding."""

import itertools
import math

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from surefoot.envs.classic import CLASSIC, ClassicEnvironment, wrap_angle

NAMES = sorted(CLASSIC)

# Walls, limits, goals, wrap-around angles and actions out of range; the random states fill what lies between.
ANGLES = [-math.pi, -3.1, -0.3, 0.0, 1.6, 3.1, math.pi]
CAR_SPEEDS = [-0.07, -0.0695, -0.01, -1e-4, 0, 1e-3, 0.0695, 0.07]
GRIDS = {
    "CartPole-v1": [[-2.45, -2.4, -2.399, 0, 2.399, 2.4, 2.45], [-3, 0, 3], [-0.22, -0.2094, 0, 0.2094, 0.22], [-3, 0, 3]],
    "Pendulum-v1": [[*ANGLES, -9.5, 3.2, 9.4, 40.0], [-8, -7.9, -1, 0, 1, 7.9, 8]],
    "Acrobot-v1": [ANGLES, ANGLES, [-4 * math.pi, -1, 0, 12.5], [-9 * math.pi, 0, 2, 28]],
    "MountainCar-v0": [[-1.2, -1.199, -1.15, -0.5, 0.44, 0.499, 0.5, 0.599, 0.6], CAR_SPEEDS],
    "MountainCarContinuous-v0": [
        [-1.2, -1.199, -1.15, -0.5, 0.449, 0.45, 0.599, 0.6],
        [-0.07, -0.0695, -0.01, -1e-4, 0, 1e-3, 0.0695, 0.07],
    ],
}
RANDOM_BOUNDS = {
    "CartPole-v1": ([-2.5, -4, -0.25, -4], [2.5, 4, 0.25, 4]),
    "Pendulum-v1": ([-30, -8], [30, 8]),
    "Acrobot-v1": ([-math.pi, -math.pi, -4 * math.pi, -9 * math.pi], [math.pi, math.pi, 4 * math.pi, 9 * math.pi]),
    "MountainCar-v0": ([-1.2, -0.07], [0.6, 0.07]),
    "MountainCarContinuous-v0": ([-1.2, -0.07], [0.6, 0.07]),
}
ACTIONS = {
    "CartPole-v1": [0, 1],
    "Pendulum-v1": [[-3.0], [-2.0], [-0.7], [0.0], [1.3], [2.0], [9.0]],
    "Acrobot-v1": [0, 1, 2],
    "MountainCar-v0": [0, 1, 2],
    "MountainCarContinuous-v0": [[-1.7], [-1.0], [-0.3], [0.0], [0.6], [1.0], [2.5]],
}


def injected(name: str) -> tuple[np.ndarray, np.ndarray]:
    """(states [S, D], actions [S, ...]): the whole grid with every action, then random states with random actions."""
    pairs = list(itertools.product(itertools.product(*GRIDS[name]), ACTIONS[name]))
    rng = np.random.default_rng(0)
    random_states = rng.uniform(*RANDOM_BOUNDS[name], size=(500, len(GRIDS[name])))
    random_actions = np.array(ACTIONS[name])[rng.integers(len(ACTIONS[name]), size=500)]
    states = np.concatenate([np.array([state for state, _ in pairs], np.float64), random_states])
    return states, np.concatenate([np.array([action for _, action in pairs]), random_actions])


def gymnasium_steps(name: str, states: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, ...]:
    """(state, observation, reward, terminated) of one step of Gymnasium from each state, in the precision of `states`."""
    env = gymnasium.make(name).unwrapped
    env.reset(seed=0)
    outcomes = []
    for state, action in zip(states, actions, strict=True):
        env.state = state
        env.steps_beyond_terminated = None  # CartPole pays nothing once it has told that it fell; here no step is a second one
        obs, reward, terminated, truncated, _ = env.step(action)
        assert not truncated
        outcomes.append((np.array(env.state), obs, reward, terminated))
    return tuple(np.array(column) for column in zip(*outcomes, strict=True))


def our_steps(name: str, states: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, ...]:
    return jax.device_get(jax.jit(jax.vmap(CLASSIC[name].step))(states, actions))


def near_threshold(name: str, state: np.ndarray) -> np.ndarray:
    """Successors [S] whose terminated flag float32 cannot decide."""
    if name == "CartPole-v1":
        return (abs(abs(state[:, 0]) - 2.4) < 1e-6) | (abs(abs(state[:, 2]) - math.radians(12)) < 1e-6)
    if name == "Acrobot-v1":
        return abs(-np.cos(state[:, 0]) - np.cos(state[:, 0] + state[:, 1]) - 1.0) < 1e-4
    if name == "Pendulum-v1":
        return np.zeros(len(state), bool)
    goal = 0.5 if name == "MountainCar-v0" else 0.45
    at_goal_speed = (state[:, 0] >= goal - 1e-6) & (abs(state[:, 1]) < 1e-8)
    return (abs(state[:, 0] - goal) < 1e-6) | at_goal_speed


@pytest.mark.parametrize("name", NAMES)
def test_one_step_has_gymnasiums_equations(name):
    """In float64 nothing is left to rounding: every injected state counts, thresholds included."""
    states, actions = injected(name)
    expected_state, expected_obs, expected_reward, expected_terminated = gymnasium_steps(name, states, actions)
    with jax.enable_x64(True):
        state, obs, reward, terminated = our_steps(name, states, actions)
    assert state.dtype == np.float64
    # Gymnasium rounds the continuous car's state to float32 at the end of its step.
    tolerance = 1e-7 if name == "MountainCarContinuous-v0" else 1e-11
    np.testing.assert_allclose(state, expected_state, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(obs, expected_obs, rtol=1e-6, atol=1e-7)  # float32 in Gymnasium
    np.testing.assert_allclose(reward, expected_reward, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(terminated, expected_terminated)


@pytest.mark.parametrize("name", NAMES)
def test_one_step_equals_gymnasiums_to_float32_rounding(name):
    states, actions = injected(name)
    states = states.astype(np.float32)
    actions = actions.astype(CLASSIC[name].action_space.dtype)
    # Gymnasium keeps the continuous car in float32 between steps, all other states in float64.
    precision = np.float32 if name == "MountainCarContinuous-v0" else np.float64
    expected_state, expected_obs, expected_reward, expected_terminated = gymnasium_steps(name, states.astype(precision), actions)
    state, obs, reward, terminated = our_steps(name, states, actions)
    assert state.dtype == obs.dtype == reward.dtype == np.float32

    if name == "Acrobot-v1":
        # The observation tells the whole state, and rounding may call pi -pi. Beyond 13 rad/s one Runge-Kutta step of 0.2 s
        # turns a link by most of a circle and multiplies the rounding of its own stages.
        fast = (abs(states[:, 2:]) > 13).any(axis=1)
        np.testing.assert_allclose(obs[~fast], expected_obs[~fast], rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(obs[fast], expected_obs[fast], rtol=2e-4, atol=2e-4)
    else:
        np.testing.assert_allclose(state, expected_state, rtol=2e-7, atol=2e-7)
        np.testing.assert_allclose(obs, expected_obs, rtol=2e-6, atol=2e-6)
    decided = ~near_threshold(name, expected_state)
    assert decided.mean() > 0.8
    np.testing.assert_array_equal(terminated[decided], expected_terminated[decided])
    np.testing.assert_allclose(reward[decided], expected_reward[decided], rtol=1e-5, atol=1e-6)
    if name != "Pendulum-v1":
        assert 0 < terminated[decided].mean() < 1


@pytest.mark.parametrize("name", ["MountainCar-v0", "MountainCarContinuous-v0"])
def test_left_wall_stops_the_car(name):
    full_left = jnp.int32(0) if name == "MountainCar-v0" else jnp.array([-1.0])
    state, _, _, terminated = CLASSIC[name].step(jnp.array([-1.19, -0.05]), full_left)
    np.testing.assert_array_equal(state, np.array([-1.2, 0.0], np.float32))
    assert not terminated


def test_right_wall_does_not_stop_the_car():
    state, _, reward, terminated = CLASSIC["MountainCarContinuous-v0"].step(jnp.array([0.59, 0.06]), jnp.array([0.0]))
    assert state[0] == np.float32(0.6)
    assert state[1] > 0.05
    assert terminated
    assert reward == 100.0


def test_thrust_is_clipped_while_its_cost_is_not():
    start = jnp.array([-0.5, 0.0])
    within, beyond = (CLASSIC["MountainCarContinuous-v0"].step(start, jnp.array([thrust])) for thrust in (1.0, 2.0))
    np.testing.assert_array_equal(within[0], beyond[0])
    assert within[2] == np.float32(-0.1)
    assert beyond[2] == np.float32(-0.4)


@pytest.mark.parametrize("name", NAMES)
def test_reset_draws_from_gymnasiums_distribution(name):
    env = gymnasium.make(name).unwrapped
    theirs = []
    for seed in range(1000):
        env.reset(seed=seed)
        theirs.append(env.state)
    state, obs = jax.vmap(CLASSIC[name].reset)(jax.random.split(jax.random.key(0), 4000))
    assert state.dtype == obs.dtype == np.float32
    for ours, reference in zip(np.asarray(state).T, np.array(theirs).T, strict=True):
        width = np.ptp(reference)
        assert abs(ours.min() - reference.min()) <= 0.01 * width
        assert abs(ours.max() - reference.max()) <= 0.01 * width
        assert stats.ks_2samp(ours, reference).pvalue > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_spaces_and_limit_are_gymnasiums(name):
    reference = gymnasium.make(name)
    ours = CLASSIC[name]
    assert ours.name == name
    assert ours.observation_space == reference.observation_space
    assert ours.observation_space.dtype == reference.observation_space.dtype
    assert ours.action_space == reference.action_space
    assert ours.action_space.dtype == reference.action_space.dtype
    assert ours.max_episode_steps == reference.spec.max_episode_steps


@pytest.mark.parametrize("name", NAMES)
def test_random_play_stays_in_the_observation_space(name):
    """The way the collector uses it: the environment an argument of the jitted function, scanned and mapped."""
    num_envs, num_steps = 8, 200
    rng = np.random.default_rng(0)
    actions = jnp.asarray(np.array(ACTIONS[name])[rng.integers(len(ACTIONS[name]), size=(num_steps, num_envs))])

    @jax.jit
    def play(env: ClassicEnvironment, keys: jax.Array) -> tuple[jax.Array, ...]:
        def one_step(state, action):
            state, obs, reward, terminated = jax.vmap(env.step)(state, action)
            return state, (obs, reward, terminated)

        state, first_obs = jax.vmap(env.reset)(keys)
        return first_obs, *jax.lax.scan(one_step, state, actions)[1]

    first_obs, obs, reward, terminated = play(CLASSIC[name], jax.random.split(jax.random.key(1), num_envs))
    assert reward.shape == terminated.shape == (num_steps, num_envs)
    assert (reward.dtype, terminated.dtype) == (np.float32, np.bool_)
    alive = np.concatenate([np.ones((1, num_envs), bool), ~np.logical_or.accumulate(terminated, axis=0)[:-1]])
    for row in [*np.asarray(first_obs), *np.asarray(obs)[alive]]:
        assert CLASSIC[name].observation_space.contains(row)


def test_wrapped_angles_are_the_same_angles():
    angle = np.linspace(-30, 30, 2001, dtype=np.float32)
    wrapped = np.asarray(wrap_angle(angle))
    assert np.abs(wrapped).max() <= np.float32(math.pi) + 1e-6
    np.testing.assert_allclose(np.exp(1j * wrapped.astype(np.float64)), np.exp(1j * angle.astype(np.float64)), atol=4e-6)
    inside = np.abs(angle) < 3.14
    np.testing.assert_array_equal(wrapped[inside], angle[inside])
