"""The probes' dynamics row by row, and their optimal values by dynamic programming over the shipped `step`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from surefoot.envs.probes import TARGET, Probe, ProbeId, expectation

GAMMA = 0.9
ONE_STEP = [ProbeId.CONSTANT, ProbeId.OBSERVATION, ProbeId.ACTION, ProbeId.BOTH]


def actions_of(probe: Probe) -> jax.Array:
    """[A, ...] the two actions, or a grid of continuous ones that contains both targets."""
    return jnp.linspace(-1.0, 1.0, 41)[:, None] if probe.continuous else jnp.arange(2)


def transitions(probe: Probe) -> tuple[np.ndarray, ...]:
    """(successor [S, A, 1], reward [S, A], terminated [S, A]) for the observations -1, 0, 1, which are the states."""
    states = jnp.array([[-1.0], [0.0], [1.0]])
    step = jax.vmap(jax.vmap(probe.step, (None, 0)), (0, None))
    _, successor, reward, terminated = step(states, actions_of(probe))
    return np.asarray(successor, np.float64), np.asarray(reward, np.float64), np.asarray(terminated)


def optimal_action_values(probe: Probe, gamma: float) -> np.ndarray:
    """[S, A] by value iteration to its fixed point; the time limit is no part of the problem, for it truncates."""
    successor, reward, terminated = transitions(probe)
    next_row = successor[..., 0].astype(int) + 1  # observation -1, 0, 1 -> row 0, 1, 2
    action_value = np.zeros_like(reward)
    for _ in range(400):
        action_value = reward + gamma * ~terminated * action_value.max(axis=1)[next_row]
    return action_value


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("probe_id", ProbeId)
def test_expectation_is_the_fixed_point_of_the_bellman_equation(probe_id, continuous):
    probe = Probe(probe_id, continuous=continuous)
    expected = expectation(probe_id, GAMMA, continuous=continuous)
    action_value = optimal_action_values(probe, GAMMA)[expected.obs[:, 0].astype(int) + 1]
    np.testing.assert_allclose(action_value.max(axis=1), expected.value, rtol=1e-6)
    if expected.action is None:
        np.testing.assert_array_equal(action_value, np.broadcast_to(action_value[:, :1], action_value.shape))
    else:
        best = np.asarray(actions_of(probe))[action_value.argmax(axis=1)]
        np.testing.assert_allclose(best, expected.action, atol=1e-6)
        assert (np.sort(action_value, axis=1)[:, -1] > np.sort(action_value, axis=1)[:, -2]).all()
        assert all(probe.action_space.contains(action) for action in expected.action)


@pytest.mark.parametrize("probe_id", ProbeId)
def test_expectation_lists_exactly_the_observations_that_play_shows(probe_id):
    """Random play under the time limit, 64 episodes of each probe."""
    probe = Probe(probe_id)

    def play(key):
        def one_step(carry, _):
            state, alive = carry
            state, obs, _, terminated = probe.step(state, jnp.int32(0))
            shown = jnp.where(alive & ~terminated, obs, jnp.nan)
            return (state, alive & ~terminated), shown

        state, first_obs = probe.reset(key)
        _, obs = jax.lax.scan(one_step, (state, True), length=probe.max_episode_steps)
        return jnp.concatenate([first_obs[None], obs])

    shown = np.asarray(jax.vmap(play)(jax.random.split(jax.random.key(0), 64)))
    shown = np.unique(shown[~np.isnan(shown)])
    np.testing.assert_array_equal(shown, expectation(probe_id, GAMMA).obs[:, 0])


@pytest.mark.parametrize("probe_id", ProbeId)
def test_episodes_last_as_long_as_the_table_says(probe_id):
    probe = Probe(probe_id)
    state, _ = probe.reset(jax.random.key(3))
    length = 0
    for _ in range(probe.max_episode_steps):
        state, _, _, terminated = probe.step(state, jnp.int32(1))
        length += 1
        if terminated:
            break
    expected = 1 if probe_id in ONE_STEP else 2 if probe_id == ProbeId.DELAYED else probe.max_episode_steps
    assert length == expected
    assert bool(terminated) == (probe_id != ProbeId.TRUNCATION)


def test_observation_is_each_sign_half_of_the_time():
    obs = np.asarray(jax.vmap(Probe(ProbeId.OBSERVATION).reset)(jax.random.split(jax.random.key(0), 4000))[1])
    assert obs.shape == (4000, 1)
    assert set(obs.ravel()) == {-1.0, 1.0}
    assert abs(obs.mean()) < 0.06  # 3.8 standard errors


def test_a_wrong_discrete_action_pays_minus_one():
    def reward(probe_id, seen, action):
        return float(Probe(probe_id).step(jnp.array([seen]), jnp.int32(action))[2])

    assert [reward(ProbeId.ACTION, 0.0, action) for action in (0, 1)] == [-1.0, 1.0]
    assert [reward(ProbeId.BOTH, 1.0, action) for action in (0, 1)] == [-1.0, 1.0]
    assert [reward(ProbeId.BOTH, -1.0, action) for action in (0, 1)] == [1.0, -1.0]


def test_continuous_reward_has_the_gradient_of_a_parabola():
    def reward(action, seen):
        return Probe(ProbeId.BOTH, continuous=True).step(jnp.array([seen]), action[None])[2]

    for seen in (-1.0, 1.0):
        np.testing.assert_allclose(jax.grad(reward)(jnp.float32(0.1), seen), -2 * (0.1 - TARGET * seen), rtol=1e-6)


@pytest.mark.parametrize("continuous", [False, True])
def test_one_compilation_serves_every_probe(continuous):
    num_traces = 0

    @jax.jit
    def total_reward(probe: Probe, keys: jax.Array) -> jax.Array:
        nonlocal num_traces
        num_traces += 1
        state, _ = jax.vmap(probe.reset)(keys)
        action = jnp.full((len(keys), 1), 0.5) if probe.continuous else jnp.ones(len(keys), int)
        return jax.vmap(probe.step)(state, action)[2].sum()

    keys = jax.random.split(jax.random.key(0), 8)
    rewards = [float(total_reward(Probe(probe_id, continuous=continuous), keys)) for probe_id in (*ProbeId, np.int64(0), jnp.int8(5))]
    assert num_traces == 1
    assert [rewards[i] for i in (ProbeId.CONSTANT, ProbeId.DELAYED, ProbeId.ACTION, ProbeId.TRUNCATION)] == [8.0, 0.0, 8.0, 8.0]
    # All probes at once, as a batch of environments.
    every_probe = Probe(jnp.arange(len(ProbeId)), continuous=continuous)
    np.testing.assert_array_equal(jax.vmap(total_reward, (0, None))(every_probe, keys), rewards[: len(ProbeId)])


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("probe_id", ProbeId)
def test_observations_and_dtypes_are_those_of_the_spaces(probe_id, continuous):
    probe = Probe(probe_id, continuous=continuous)
    state, obs = probe.reset(jax.random.key(0))
    action = jnp.asarray(probe.action_space.sample())
    _, next_obs, reward, terminated = probe.step(state, action)
    assert probe.observation_space.contains(np.asarray(obs))
    assert probe.observation_space.contains(np.asarray(next_obs))
    assert (reward.shape, reward.dtype) == ((), np.float32)
    assert (terminated.shape, terminated.dtype) == ((), np.bool_)


def test_names_tell_the_two_forms_apart():
    assert (Probe(0).name, Probe(0, continuous=True).name) == ("probe", "probe-continuous")


@pytest.mark.parametrize("probe_id", [6, -1, np.int32(7)])
def test_an_unknown_probe_is_refused_with_the_list(probe_id):
    with pytest.raises(ValueError, match=r"there is no probe .*5 \(TRUNCATION\)"):
        Probe(probe_id)


@pytest.mark.parametrize("gamma", [1.0, -0.1, 1.5])
def test_expectation_refuses_a_discount_without_finite_value(gamma):
    with pytest.raises(ValueError, match="0 <= gamma < 1"):
        expectation(ProbeId.CONSTANT, gamma)
