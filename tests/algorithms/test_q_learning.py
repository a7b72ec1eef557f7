"""Q-learning in a table: updates in loops, what they are on average, whom acting follows, and the optimum that comes of it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from batches import batches_of, experience, table_spec, with_reset_rows
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete
from oracle import TOLERANCE
from support import Walk, bits

import surefoot as sf
from surefoot.algorithms import q_learning
from surefoot.algorithms.q_learning import Acting, QLearning, State, place
from surefoot.collect import scan_rollout, start_stream
from surefoot.envs.probes import Probe, ProbeId, expectation
from surefoot.types import EnvironmentSpec, Rollout

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(0)
SPACES = {
    "counted": Discrete(5),
    "counted from 3": Discrete(4, start=3),
    "counted from -2": Discrete(4, start=-2),
    "bytes": MultiDiscrete([3, 4], np.uint8),
    "parts": MultiDiscrete([2, 3], start=[-1, 7]),
    "parts in a square": MultiDiscrete([[2, 1], [3, 2]], start=[[0, 5], [-1, 1]]),
    "bits": MultiBinary((3, 1)),
    "a dictionary": Dict([("b", Discrete(3, start=1)), ("a", Dict([("y", MultiDiscrete([2, 2])), ("x", Discrete(2))]))]),
}

update = jax.jit(lambda config, state, rollout: q_learning.update(config, state, rollout, None, KEY), static_argnums=0)


def spec_of(space, num_actions=3):
    return EnvironmentSpec("counted", space, Discrete(num_actions), 2)


def first_state(config, space, num_actions=3):
    return q_learning.init(config, spec_of(space, num_actions), KEY)


def made_up(space, num_steps=40, num_envs=3, num_actions=3, *, masked=False, seed=0):
    """Rows of any contents: ends, cuts, both at once, rows that do not count, and with `masked` actions that are not legal."""
    rng = np.random.default_rng(seed)
    space.seed(seed)
    shape = num_steps, num_envs

    def observations(*shape):
        drawn = [space.sample() for _ in range(np.prod(shape))]
        return jax.tree.map(lambda *each: np.stack(each).reshape(*shape, *np.shape(each[0])), *drawn)

    def legal(*shape):
        return (rng.random((*shape, num_actions)) < 0.5) | (np.arange(num_actions) == rng.integers(num_actions, size=(*shape, 1)))

    terminated, truncated, valid = (rng.random(shape) < share for share in (0.3, 0.3, 0.8))
    return Rollout(
        obs=observations(*shape),
        action=rng.integers(num_actions, size=shape, dtype=np.int32),
        reward=np.where(valid, rng.normal(size=shape), 99.0),
        terminated=terminated,
        truncated=truncated,
        final_obs=observations(*shape),
        valid=valid,
        time=np.zeros(shape, np.int32),
        last_obs=observations(num_envs),
        progress=np.float32(0.25),
        action_mask=legal(*shape) if masked else None,
        final_action_mask=legal(*shape) & ~terminated[..., None] if masked else None,  # what ended may have no legal action
        last_action_mask=legal(num_envs) if masked else None,
    )


def row(tree, *index):
    return jax.tree.map(lambda x: x[index], tree)


class ByDefinition:
    """The same in loops: a dictionary from what was observed to the values of actions."""

    def __init__(self, config, num_actions=3):
        self.config, self.num_actions, self.values = config, num_actions, {}

    def of(self, obs):
        name = repr(jax.tree.map(lambda x: np.asarray(x).tolist(), obs))
        return self.values.setdefault(name, np.full(self.num_actions, self.config.initial_value))

    def learn(self, rollout, rate):
        """The absolute errors, one for each row that counts."""
        errors = []
        num_steps, num_envs = rollout.reward.shape
        for t in range(num_steps):
            for n in range(num_envs):
                if not rollout.valid[t, n]:
                    continue
                if rollout.terminated[t, n] or rollout.truncated[t, n]:
                    following, mask = row(rollout.final_obs, t, n), row(rollout.final_action_mask, t, n)
                elif t + 1 < num_steps:
                    following, mask = row(rollout.obs, t + 1, n), row(rollout.action_mask, t + 1, n)
                else:
                    following, mask = row(rollout.last_obs, n), row(rollout.last_action_mask, n)
                target = rollout.reward[t, n]
                if not rollout.terminated[t, n]:
                    target += self.config.gamma * np.max(self.of(following)[slice(None) if mask is None else mask])
                values, action = self.of(row(rollout.obs, t, n)), rollout.action[t, n]
                errors.append(abs(target - values[action]))
                values[action] += rate * (target - values[action])
        return errors


@pytest.mark.parametrize("masked", [False, True], ids=["all legal", "masked"])
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_an_update_takes_row_after_row_into_the_same_table(space, masked):
    config = QLearning(gamma=0.9, learning_rate=0.3, initial_value=0.5)
    state, expected = first_state(config, space), ByDefinition(config)
    for seed in (1, 2):
        rollout = made_up(space, masked=masked, seed=seed)
        errors = expected.learn(rollout, 0.3)
        state, metrics = update(config, state, rollout)
        np.testing.assert_allclose(metrics["td_error"], np.mean(errors), **TOLERANCE)
    for obs in (rollout.obs, rollout.final_obs):
        for index in np.ndindex(rollout.reward.shape):
            one = row(obs, *index)
            values = state.acting.table[place(state.acting.first, jax.tree.map(lambda x: np.asarray(x)[None], one))]
            np.testing.assert_allclose(values[0], expected.of(one), **TOLERANCE)


def test_every_observation_has_its_place():
    """No two share one, and none is left without: what is counted in all is as many as the table has."""
    for space in SPACES.values():
        state, everything = first_state(QLearning(), space), made_up(space, 200).obs
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), everything)
        where = set(zip(*(np.asarray(index).tolist() for index in place(state.acting.first, flat)), strict=True))
        assert len(where) == len({repr(row(flat, i)) for i in range(600)}) == state.acting.table[..., 0].size
        assert np.min(list(where)) == 0


def test_rows_of_a_reset_do_not_matter():
    config, rollout = QLearning(learning_rate=0.5), experience(table_spec(5, 3, 2), (3, 1, 2), seed=5)
    (one,), (other,) = (batches_of(stream, 9) for stream in (rollout, with_reset_rows(rollout)))
    plain, with_rows = (update(config, first_state(config, Discrete(5)), batch) for batch in (one, other))
    np.testing.assert_allclose(with_rows[0].acting.table, plain[0].acting.table, **TOLERANCE)
    np.testing.assert_allclose(with_rows[1]["td_error"], plain[1]["td_error"], **TOLERANCE)
    assert plain[1]["td_error"] > 0.1
    nothing = one._replace(valid=np.zeros_like(one.valid))
    after, metrics = update(config, plain[0], nothing)
    np.testing.assert_array_equal(after.acting.table, plain[0].acting.table)
    assert metrics["td_error"] == 0


@pytest.mark.parametrize(
    ("progress", "epsilon", "rate"), [(0.0, 1.0, 0.4), (0.1, 0.75, 0.36), (0.3, 0.25, 0.28), (0.4, 0.0, 0.24), (0.9, 0.0, 0.04)]
)
def test_exploration_and_step_size_follow_the_run(progress, epsilon, rate):
    settings = {"learning_rate": 0.4, "exploration_fraction": 0.4, "gamma": 0.9}
    config = QLearning(**settings, final_epsilon=0.0, learning_rate_schedule="linear")
    rollout = made_up(Discrete(5))._replace(progress=np.float64(progress))
    expected = ByDefinition(config)
    expected.learn(rollout, rate)
    state, metrics = update(config, first_state(config, Discrete(5)), rollout)
    np.testing.assert_allclose(state.acting.table, [expected.of(np.asarray(obs)) for obs in range(5)], **TOLERANCE)
    for value in (state.acting.epsilon, metrics["epsilon"]):
        np.testing.assert_allclose(value, epsilon, **TOLERANCE)
    np.testing.assert_allclose(metrics["learning_rate"], rate, **TOLERANCE)
    _, metrics = update(QLearning(**settings, final_epsilon=0.2), first_state(config, Discrete(5)), rollout)
    np.testing.assert_allclose(metrics["epsilon"], max(0.2, 1 - 0.8 * progress / 0.4), **TOLERANCE)
    assert metrics["learning_rate"] == 0.4


# Acting


def acting(table, epsilon):
    return Acting(jnp.asarray(table), jnp.asarray(epsilon), (jnp.int32(0),))


def shares(table, epsilon, mask=None, draws=40_000):
    """How often each action is taken where a table of one observation stands, [A]."""
    mask = None if mask is None else jnp.tile(jnp.asarray(mask), (draws, 1))
    obs = jnp.zeros(draws, jnp.int32)
    action, _ = q_learning.act(QLearning(), acting([table], epsilon), obs, mask, None, jax.random.key(3))
    return np.bincount(action, minlength=len(table)) / draws


NEAR = {"rtol": 0, "atol": 0.0125}  # five standard deviations of a share of a half among 40,000, and more of every other


def test_of_equal_actions_each_is_as_likely():
    np.testing.assert_allclose(shares([1.0, 2.0, 2.0, -1.0, 2.0], 0.0), [0, 1 / 3, 1 / 3, 0, 1 / 3], **NEAR)
    np.testing.assert_allclose(shares([0.0] * 4, 0.0), [1 / 4] * 4, **NEAR)
    np.testing.assert_allclose(shares([3.0, 2.0, 2.0, 1.0], 0.0, [False, True, True, True]), [0, 1 / 2, 1 / 2, 0], **NEAR)
    assert set(np.flatnonzero(shares([3.0, 2.0, 2.0, 1.0], 0.0, [False, True, True, True]))) == {1, 2}


def test_a_random_action_is_any_that_is_legal():
    np.testing.assert_allclose(shares([1.0, 2.0, 0.0, 0.0], 1.0), [1 / 4] * 4, **NEAR)
    np.testing.assert_allclose(shares([1.0, 2.0, 0.0, 0.0], 0.4), [0.1, 0.7, 0.1, 0.1], **NEAR)
    np.testing.assert_allclose(shares([1.0, 2.0, 0.0, 0.0], 0.6, [True, False, True, True]), [0.6, 0, 0.2, 0.2], **NEAR)
    assert shares([1.0, 2.0, 0.0], 1.0, [True, False, True])[1] == 0


def test_streams_draw_for_themselves_and_every_step_anew():
    table, obs = acting([[0.0] * 4], 0.5), jnp.zeros(64, jnp.int32)
    first, second = (q_learning.act(QLearning(), table, obs, None, None, jax.random.key(seed))[0] for seed in (0, 1))
    assert len(set(np.asarray(first))) == 4
    assert np.mean(first == second) < 0.5


def test_without_a_key_it_is_the_first_of_the_best_that_are_legal():
    table = acting([[1.0, 2.0, 2.0], [5.0, 2.0, 2.0], [-1.0, -1.0, -1.0]], 1.0)
    obs = jnp.asarray([0, 1, 2, 1])
    action, carry = q_learning.act(QLearning(), table, obs, None, None, None)
    np.testing.assert_array_equal(action, [1, 0, 0, 0])
    assert (action.dtype, carry) == (jnp.int32, None)
    mask = jnp.asarray([[True, False, True], [False, True, True], [False, False, True], [True, True, True]])
    np.testing.assert_array_equal(q_learning.act(QLearning(), table, obs, mask, None, None)[0], [2, 1, 2, 0])


# What is learned: an endless task of four states, whose last is terminal, by value iteration

MDP = oracle.random_mdp(4, num_states=4, num_actions=3)


def optimum(mdp):
    """Q* [S, A] by value iteration, to the last bit."""
    action_value = np.zeros(mdp.reward.shape[:2])
    for _ in range(2000):
        value = np.where(mdp.terminal, 0.0, action_value.max(axis=-1))
        action_value = np.sum(mdp.transition * (mdp.reward + mdp.discount * value), axis=-1)
    return action_value


@partial(jax.jit, static_argnums=0)
def mean_update(rate, table):
    """What one row does to a table [S, A] on average over its successors, for each state and action that the row may be of: [S, A]."""
    config = QLearning(gamma=MDP.discount, learning_rate=rate)
    state, action, following = (jnp.asarray(index.ravel(), jnp.int32) for index in np.indices(MDP.reward.shape))

    def moved(state, action, following):
        never = jnp.zeros((1, 1), bool)
        rollout = Rollout(
            obs=state[None, None],
            action=action[None, None],
            reward=jnp.asarray(MDP.reward)[state, action, following][None, None],
            terminated=jnp.asarray(MDP.terminal)[following][None, None],
            truncated=never,
            final_obs=following[None, None],
            valid=~never,
            time=jnp.zeros((1, 1), jnp.int32),
            last_obs=following[None],
            progress=jnp.zeros(()),
        )
        after, _ = q_learning.update(config, State(acting(table, 1.0)), rollout, None, KEY)
        return (after.acting.table - table)[state, action]

    return jnp.sum(MDP.transition * jax.vmap(moved)(state, action, following).reshape(MDP.reward.shape), axis=-1)


def test_on_average_an_update_is_a_step_of_value_iteration_and_ends_at_the_optimum():
    best = optimum(MDP)
    np.testing.assert_allclose(mean_update(0.3, jnp.asarray(best)), 0.0, **TOLERANCE)
    table = np.random.default_rng(0).normal(size=best.shape)
    value = np.where(MDP.terminal, 0.0, table.max(axis=-1))
    iterated = np.sum(MDP.transition * (MDP.reward + MDP.discount * value), axis=-1)
    np.testing.assert_allclose(mean_update(0.3, jnp.asarray(table)), 0.3 * (iterated - table), **TOLERANCE)
    for _ in range(1500):
        table = table + mean_update(0.3, jnp.asarray(table))
    np.testing.assert_allclose(table, best, **TOLERANCE)


class Ring:
    """Five places in a ring, of which 0 ends the episode with 1; every other step costs a little, and leads where it should."""

    name, observation_space, action_space, max_episode_steps = "Ring", Discrete(5), Discrete(2), 50

    def reset(self, key):
        place = jax.random.randint(key, (), 1, 5, jnp.int32)
        return place, place

    def step(self, place, action):
        place = (place + jnp.where(action == 1, 1, -1)) % 5
        return place, place, jnp.where(place == 0, 1.0, -0.1), place == 0


def learn_in(environment, config, iterations, num_envs=4):
    spec = EnvironmentSpec(environment.name, environment.observation_space, environment.action_space, num_envs)

    @jax.jit
    def learn(key):
        state = q_learning.init(config, spec, key)
        stream = start_stream(environment, num_envs, key, partial(q_learning.act, config, state.acting))

        def iteration(carry, index):
            act = partial(q_learning.act, config, carry[0].acting)
            stream, rollout = scan_rollout(environment, act, carry[1], config.num_steps, index / iterations, jax.random.fold_in(key, index))
            return (q_learning.update(config, carry[0], rollout, None, key)[0], stream), None

        return jax.lax.scan(iteration, (state, stream), jnp.arange(iterations))[0][0]

    return learn(KEY)


def test_a_run_of_its_own_ends_at_the_optimum():
    """Of a task without chance, whose values by hand are those of the nearer way round."""
    state = learn_in(Ring(), QLearning(gamma=0.9, learning_rate=0.5), 400)
    near, far = 1.0, 0.9 * 1.0 - 0.1
    after_far, after_near = 0.9 * far - 0.1, 0.9 * near - 0.1
    by_hand = [[0.0, 0.0], [near, after_far], [far, after_far], [after_far, far], [after_far, near]]
    assert after_near == far
    np.testing.assert_allclose(state.acting.table, by_hand, rtol=1e-6, atol=1e-6)


class Counted(Probe):
    """A probe whose observations, -1, 0 and 1, are counted from -1."""

    @property
    def observation_space(self):
        return Discrete(3, start=-1)

    def reset(self, key):
        state, obs = super().reset(key)
        return state, obs[0].astype(jnp.int32)

    def step(self, state, action):
        state, obs, reward, terminated = super().step(state, action)
        return state, obs[0].astype(jnp.int32), reward, terminated


@pytest.mark.parametrize("probe", list(ProbeId), ids=lambda probe: probe.name.lower())
def test_it_learns_the_value_and_the_action_of_each_probe(probe):
    config = QLearning(gamma=0.8)
    state = learn_in(Counted(probe), config, 100)
    expected = expectation(probe, config.gamma)
    obs = jnp.asarray(expected.obs[:, 0], jnp.int32)
    np.testing.assert_allclose(jnp.max(state.acting.table[place(state.acting.first, obs)], axis=-1), expected.value, atol=0.02)
    if expected.action is not None:
        np.testing.assert_array_equal(q_learning.act(config, state.acting, obs, None, None, None)[0], expected.action)


@pytest.mark.parametrize("seed", range(5))
def test_the_best_actions_by_the_values_of_a_policy_are_nowhere_worse_than_it(seed):
    """Sutton & Barto 2018, eq. 4.7 and 4.8, the values solved for; and where they are no better anywhere, they are the best there are."""
    policy = np.random.default_rng(seed).dirichlet(np.ones(3), size=4)
    alive = ~MDP.terminal

    def values(policy):
        transition = np.einsum("sa,sax->sx", policy, MDP.transition) * alive
        reward = np.einsum("sa,sax,sax->s", policy, MDP.transition, MDP.reward)
        value = np.linalg.solve(np.eye(4) - MDP.discount * transition, reward)
        return value, np.sum(MDP.transition * (MDP.reward + MDP.discount * value * alive), axis=-1)

    value, action_value = values(policy)
    for _ in range(3 * 3**3):  # more often than there are policies without chance
        action, _ = q_learning.act(QLearning(), acting(action_value, 1.0), jnp.arange(4), None, None, None)
        better, better_action_value = values(np.eye(3)[np.asarray(action)])
        assert np.all(better >= value - 1e-12)
        if np.allclose(better, value, rtol=0, atol=1e-12):
            break
        value, action_value = better, better_action_value
    np.testing.assert_allclose(action_value, optimum(MDP), **TOLERANCE)


# What is refused, and the rest of a run


@pytest.mark.parametrize(
    ("observation_space", "action_space"),
    [
        (Box(-1.0, 1.0, (2,)), Discrete(2)),
        (Box(0, 9, (2,), np.int32), Discrete(2)),
        (Dict(a=Discrete(2), b=Box(-1.0, 1.0, (2,))), Discrete(2)),
        (Dict(a=Discrete(2), b=Dict(c=Box(-1.0, 1.0, (2,)))), Discrete(2)),
        (Discrete(4), MultiDiscrete([2, 2])),
        (Discrete(4), MultiBinary(2)),
        (Discrete(4), Box(-1.0, 1.0, (2,))),
    ],
)
def test_what_cannot_be_counted_is_refused(observation_space, action_space):
    words = r"^A table needs discrete observations and a Discrete action space, and these are .* and .*; take dqn for other observations"
    with pytest.raises(ValueError, match=words) as error:
        q_learning.init(QLearning(), EnvironmentSpec("other", observation_space, action_space, 2), KEY)
    assert f"{observation_space} and {action_space}; " in str(error.value)


def test_a_table_that_is_too_large_is_refused_before_it_is_made():
    with pytest.raises(ValueError, match=r"^A table of 10000 x 5000 x 3 has more than 100,000,000 entries; take dqn\.$"):
        first_state(QLearning(), MultiDiscrete([10_000, 5_000]))
    table = jax.eval_shape(partial(q_learning.init, QLearning(), spec_of(MultiDiscrete([10_000, 5_000]), 2)), KEY).acting.table
    assert table.shape == (10_000, 5_000, 2)


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("gamma", (0.0, 1.0), (-0.01, 1.01)),
        ("num_steps", (1,), (0,)),
        ("learning_rate", (1e-9, 1.0), (0.0, 1.01)),
        ("initial_value", (-1e6, 1e6), (np.inf, -np.inf, np.nan)),
        ("exploration_fraction", (1e-9, 1.0), (0.0, 1.01)),
        ("final_epsilon", (0.0, 1.0), (-0.01, 1.01)),
    ],
)
def test_bounds(name, inside, outside):
    for value in inside:
        QLearning(**{name: value})
    for value in outside:
        with pytest.raises(ValueError, match=rf"^QLearning\.{name} must lie in"):
            QLearning(**{name: value})


class CountedWalk(Walk):
    observation_space = Discrete(4, start=1)

    def observe(self):
        return int(self.np_random.integers(1, 5))


@pytest.mark.parametrize("env", [Ring(), CountedWalk], ids=["device", "host"])
def test_a_run_that_is_cut_goes_on_with_the_same_bits(env, tmp_path):
    with jax.enable_x64(False):
        options = {"steps": 2048, "num_envs": 4, "seed": 0}
        whole = sf.train(QLearning(), env, out=tmp_path / "whole", progress=False, **options)
        for report in sf.iterate(QLearning(), env, out=tmp_path / "cut", **options):
            if report.step >= 512:
                break
        resumed = sf.resume(tmp_path / "cut", env, progress=False)
        assert bits(resumed.path) == bits(whole.path)
        loaded = sf.load(whole.path)
        np.testing.assert_array_equal(loaded.act(np.arange(1, 5)), whole.policy.act(np.arange(1, 5)))
