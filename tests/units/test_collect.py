"""Collecting against plain loops: true successors, flags, time, resets, and going on where one stopped."""

import functools

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from surefoot.collect import HostCollector, as_rollout, scan_rollout, start_stream
from surefoot.envs.gymnasium import gymnasium_environment
from surefoot.envs.vector import VectorEnvironment
from surefoot.types import EnvironmentSpec, Step

# Device environments


class Climb:
    """Climb to 4 from a place in [-1, 2]. Everyone who climbs at each step arrives within 5 steps, some at the limit itself."""

    name = "climb"
    observation_space = Dict(place=Box(-9, 9, (), np.int64), luck=Box(0.0, 1.0, (1,), np.float64))
    action_space = Discrete(3, start=5)  # 5 stays, 6 climbs one, 7 climbs two
    max_episode_steps = 5

    @staticmethod
    def reset(key):
        place_key, luck_key = jax.random.split(key)
        state = {"place": jax.random.randint(place_key, (), -1, 3), "luck": jax.random.uniform(luck_key, (1,)), "key": key}
        return state, Climb.look(state)

    @staticmethod
    def step(state, action):
        place = state["place"] + action - 5
        state = state | {"place": place}
        return state, Climb.look(state), 10 * place + action, place >= 4

    @staticmethod
    def look(state):
        return {"place": state["place"].astype(jnp.int8), "luck": state["luck"].astype(jnp.float16)}


ENVIRONMENT = Climb()
NUM_ENVS = 6


def climb_if_lucky(obs, action_mask, carry, key):
    """Without a key, so that rows do not depend on how a batch is cut."""
    return (obs["luck"][:, 0] > 0.4).astype(jnp.int32), carry


def climb_at_random(obs, action_mask, carry, key):
    return jax.random.randint(key, obs["place"].shape, 0, 3), carry


@functools.partial(jax.jit, static_argnums=(0, 2))
def scan(act, stream, num_steps, key):
    return scan_rollout(ENVIRONMENT, act, stream, num_steps, jnp.float32(0.25), key)


def start(seed=0, carry=None):
    return jax.jit(lambda key: start_stream(ENVIRONMENT, NUM_ENVS, key))(jax.random.key(seed))._replace(carry=carry)


def assert_equal(one, other):
    """Bit for bit, keys included."""
    leaves, other_leaves = jax.tree.leaves(one), jax.tree.leaves(other)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for leaf, other_leaf in zip(leaves, other_leaves, strict=True):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf, other_leaf = jax.random.key_data(leaf), jax.random.key_data(other_leaf)
        assert leaf.dtype == other_leaf.dtype
        np.testing.assert_array_equal(leaf, other_leaf)


def test_scan_rollout_against_a_loop_over_single_environments():
    num_steps, key = 16, jax.random.key(1)
    stream, rollout = scan(climb_at_random, start(), num_steps, key)
    reset, step = jax.jit(Climb.reset), jax.jit(Climb.step)
    pairs = [jax.random.split(key) for key in jax.random.split(jax.random.key(0), NUM_ENVS)]
    own_keys = [pair[0] for pair in pairs]
    states, seen = map(list, zip(*(reset(pair[1]) for pair in pairs), strict=True))
    elapsed = [0] * NUM_ENVS
    for t, step_key in enumerate(jax.random.split(key, num_steps)):
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seen)
        action, _ = climb_at_random(stacked, None, None, step_key)
        for n in range(NUM_ENVS):
            row = jax.tree.map(lambda x, t=t, n=n: x[t, n], rollout._replace(last_obs=None, progress=None))
            assert (row.obs["place"], row.obs["luck"]) == (seen[n]["place"], seen[n]["luck"].astype(jnp.float32))
            assert (row.action, row.time, row.valid) == (action[n], elapsed[n], True)
            states[n], seen[n], reward, terminated = step(states[n], action[n] + 5)
            elapsed[n] += 1
            truncated = elapsed[n] == Climb.max_episode_steps
            assert (row.reward, row.terminated, row.truncated) == (reward, terminated, truncated)
            assert (row.final_obs["place"], row.final_obs["luck"]) == (seen[n]["place"], seen[n]["luck"].astype(jnp.float32))
            if terminated or truncated:
                own_keys[n], reset_key = jax.random.split(own_keys[n])
                states[n], seen[n] = reset(reset_key)
                elapsed[n] = 0
    np.testing.assert_array_equal(rollout.last_obs["place"], [obs["place"] for obs in seen])
    np.testing.assert_array_equal(stream.time, elapsed)
    assert_equal(stream.keys, jnp.stack(own_keys))
    both = rollout.terminated & rollout.truncated
    assert both.any()
    assert (rollout.terminated & ~both).any()
    assert (rollout.truncated & ~both).any()
    assert rollout.progress == 0.25


def test_rollouts_have_the_dtypes_of_the_contract():
    _, rollout = scan(climb_at_random, start(), 16, jax.random.key(1))
    assert jax.tree.map(lambda x: x.dtype.name, rollout._asdict()) == {
        "obs": {"place": "int32", "luck": "float32"},
        "action": "int32",
        "reward": "float32",
        "terminated": "bool",
        "truncated": "bool",
        "final_obs": {"place": "int32", "luck": "float32"},
        "valid": "bool",
        "time": "int32",
        "last_obs": {"place": "int32", "luck": "float32"},
        "progress": "float32",
        "action_mask": None,
        "final_action_mask": None,
        "last_action_mask": None,
        "score": None,
        "game_over": None,
        "carry": None,
        "acting": None,
    }


def test_a_rollout_in_two_halves_is_the_whole():
    end, whole = scan(climb_if_lucky, start(), 16, jax.random.key(1))
    middle, first = scan(climb_if_lucky, start(), 8, jax.random.key(2))
    end_of_halves, second = scan(climb_if_lucky, middle, 8, jax.random.key(3))
    assert_equal(end, end_of_halves)
    rows = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *(half._replace(last_obs=None, progress=None) for half in (first, second)))
    assert_equal(whole._replace(last_obs=None, progress=None), rows)
    assert_equal(whole.last_obs, second.last_obs)
    assert_equal(first.last_obs, jax.tree.map(lambda x: x[0], second.obs))
    assert (np.asarray(whole.time)[8] > 0).any()  # an episode that lies in both halves


def test_episodes_are_cut_exactly_at_the_limit():
    _, rollout = scan(lambda obs, mask, carry, key: (jnp.zeros(NUM_ENVS, jnp.int32), carry), start(), 16, jax.random.key(1))
    np.testing.assert_array_equal(rollout.time, np.tile(np.arange(16)[:, None] % 5, NUM_ENVS))
    np.testing.assert_array_equal(rollout.truncated, rollout.time == 4)
    assert not rollout.terminated.any()


def test_every_episode_begins_differently_and_streams_do_not_share_them():
    _, rollout = scan(climb_if_lucky, start(), 16, jax.random.key(1))
    first = np.asarray(rollout.obs["luck"])[np.asarray(rollout.time) == 0].ravel()
    assert len(first) > 2 * NUM_ENVS
    assert len(np.unique(first)) == len(first)
    assert not np.array_equal(first[:NUM_ENVS], start(1).obs["luck"].ravel())


def act_as_carry_says(obs, action_mask, carry, key):
    """The carry counts steps, and would tell of it if it came over from another episode."""
    carry = jnp.zeros(len(obs["luck"])) if carry is None else carry
    return (carry % 3).astype(jnp.int32), carry + 1


def test_recurrent_state_begins_at_zero_with_every_episode():
    stream = start(carry=jnp.full(NUM_ENVS, 7.0))
    middle, first = scan(act_as_carry_says, stream, 9, jax.random.key(1))
    end, second = scan(act_as_carry_says, middle, 9, jax.random.key(1))
    for rollout in (first, second):
        np.testing.assert_array_equal(rollout.action, rollout.time % 3)
    np.testing.assert_array_equal(first.carry, 7.0)
    np.testing.assert_array_equal(second.carry, middle.carry)
    assert (np.asarray(second.time)[0] > 0).any()
    assert set(np.asarray(end.carry).tolist()) <= {1.0, 2.0, 3.0, 4.0, 5.0}


# Host environments


class Tape:
    """A host environment that plays a prepared story and keeps what it is given. Its arrays are overwritten at each step."""

    def __init__(self, length=12, num_envs=3, seed=0):
        rng = np.random.default_rng(seed)
        rows = length + 1, num_envs
        self.story = {
            "luck": rng.random((*rows, 1)).astype(np.float32),
            "place": rng.integers(-9, 9, rows).astype(np.int32),
            "final_luck": rng.random((*rows, 1)).astype(np.float32),
            "final_place": rng.integers(-9, 9, rows).astype(np.int32),
            "reward": rng.normal(size=rows).astype(np.float32),
            "terminated": rng.random(rows) < 0.25,
            "truncated": rng.random(rows) < 0.25,
            "valid": np.ones(rows, bool),
            "mask": rng.random((*rows, 4)) < 0.5,
            "final_mask": rng.random((*rows, 4)) < 0.5,
        }
        self.story["mask"][..., 0] = True
        for t in range(1, length + 1):  # some resets cost a row
            spent = (self.story["terminated"] | self.story["truncated"])[t - 1] & (rng.random(num_envs) < 0.5)
            for name in ("valid", "terminated", "truncated"):
                self.story[name][t, spent] = False
        self.story["score"] = rng.normal(size=rows).astype(np.float32)
        self.story["game_over"] = self.story["terminated"] & (rng.random(rows) < 0.5)
        space = Dict(inner=Dict(luck=Box(0.0, 1.0, (1,))), place=Box(-9, 9, (), np.int64))
        self.spec = EnvironmentSpec("tape", space, Discrete(4, start=10), num_envs, has_action_mask=True)
        self.live = {name: array[0].copy() for name, array in self.story.items()}
        self.position, self.actions = 0, []

    def show(self):
        for name, array in self.story.items():
            self.live[name][...] = array[self.position]
        self.position += 1

    def obs(self, prefix=""):
        return {"inner": {"luck": self.live[f"{prefix}luck"]}, "place": self.live[f"{prefix}place"]}

    def reset(self, seed):
        self.position = 0
        self.show()
        return self.obs(), self.live["mask"]

    def step(self, action):
        self.actions.append(action.copy())
        self.show()
        live = self.live
        flags = live["terminated"], live["truncated"]
        masks = live["mask"], live["final_mask"]
        return Step(self.obs(), live["reward"], *flags, self.obs("final_"), live["valid"], *masks, live["score"], live["game_over"])

    def get_state(self):
        return {"position": np.array(self.position)}, {"length": len(self.story["luck"])}

    def set_state(self, arrays, info):
        assert info == {"length": len(self.story["luck"])}
        self.position = int(arrays["position"])


def act_on_tape(acting, obs, action_mask, carry, key):
    """A legal action that depends on all that acting is given."""
    assert obs["place"].dtype == jnp.int32
    score = acting * obs["inner"]["luck"] + jax.random.uniform(key, (obs["place"].shape[0], 4)) + 0.1 * obs["place"][:, None]
    return jnp.argmax(jnp.where(action_mask, jnp.sin(9 * score), -jnp.inf), axis=-1), carry


def test_host_collector_against_the_story():
    environment, num_steps = Tape(), 6
    story = environment.story
    collector = HostCollector(environment, act_on_tape, num_steps, seed=0)
    ended = story["terminated"] | story["truncated"]
    assert (~story["valid"]).any()
    time = np.zeros(3, int)
    for batch in range(2):
        key, acting = jax.random.key(batch), jnp.float32(1.5 + batch)
        rollout = collector.collect(acting, 0.5, key)
        for t in range(num_steps):
            before, after = batch * num_steps + t, batch * num_steps + t + 1
            obs = {"inner": {"luck": story["luck"][before]}, "place": story["place"][before]}
            assert_equal(jax.tree.map(lambda x, t=t: x[t], rollout.obs), obs)
            action, _ = act_on_tape(acting, obs, story["mask"][before], None, jax.random.fold_in(key, t))
            np.testing.assert_array_equal(rollout.action[t], action)
            np.testing.assert_array_equal(environment.actions[before], action + 10)
            np.testing.assert_array_equal(rollout.action_mask[t], story["mask"][before])
            for name in ("reward", "terminated", "truncated", "valid", "score", "game_over"):
                np.testing.assert_array_equal(getattr(rollout, name)[t], story[name][after])
            over = ended[after]
            np.testing.assert_array_equal(rollout.final_obs["inner"]["luck"][t][over], story["final_luck"][after][over])
            np.testing.assert_array_equal(rollout.final_obs["place"][t][over], story["final_place"][after][over])
            np.testing.assert_array_equal(rollout.final_action_mask[t][over], story["final_mask"][after][over])
            np.testing.assert_array_equal(rollout.time[t], time)
            time = np.where(over, 0, time + story["valid"][after])
        assert_equal(rollout.last_obs, {"inner": {"luck": story["luck"][after]}, "place": story["place"][after]})
        np.testing.assert_array_equal(rollout.last_action_mask, story["mask"][after])
        assert (rollout.progress, rollout.progress.dtype, rollout.carry) == (0.5, np.float32, None)
        assert (rollout.reward.dtype, rollout.time.dtype, rollout.obs["place"].dtype) == (np.float32, np.int32, np.int32)
    assert collector.seconds["environment"] > 0 < collector.seconds["acting"]


def test_as_many_rollouts_as_were_asked_for_stay_as_they_are():
    collector = HostCollector(Tape(18), act_on_tape, 6, seed=0, num_rollouts=2)
    first, _ = (collector.collect(jnp.float32(1.0), 0.5, jax.random.key(0)) for _ in range(2))
    alone = HostCollector(Tape(18), act_on_tape, 6, seed=0).collect(jnp.float32(1.0), 0.5, jax.random.key(0))
    assert_equal(first, alone)
    third = collector.collect(jnp.float32(1.0), 0.5, jax.random.key(0))
    assert np.shares_memory(first.reward, third.reward)


def test_a_rollout_is_put_together_from_its_arrays_by_path():
    environment = Tape()
    rollout = HostCollector(environment, act_on_tape, 6, seed=0).collect(jnp.float32(1.0), 0.5, jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(rollout)
    arrays = {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}
    got = as_rollout(arrays, environment.obs())
    assert jax.tree.structure(got) == jax.tree.structure(rollout)
    assert_equal(got, rollout)


def test_recurrent_state_on_a_host_environment():
    collector = HostCollector(Tape(), lambda acting, obs, *others: act_as_carry_says(obs["inner"], *others), 6, seed=0)
    first = collector.collect(None, 0.0, jax.random.key(0))
    np.testing.assert_array_equal(first.action, first.time % 3)
    second = collector.collect(None, 0.0, jax.random.key(0))
    np.testing.assert_array_equal(second.action, second.time % 3)
    assert (np.asarray(second.time)[0] > 0).any()


def test_collecting_goes_on_from_a_state():
    """With masks, a nested dictionary and episodes under way; and the state does not change after it was given."""
    collector = HostCollector(Tape(), act_on_tape, 6, seed=0)
    collector.collect(jnp.float32(1.0), 0.0, jax.random.key(0))
    arrays, info = collector.get_state()
    expected = jax.tree.map(np.array, collector.collect(jnp.float32(1.0), 0.5, jax.random.key(1)))
    assert expected.time[0].any()
    fresh = HostCollector(Tape(), act_on_tape, 6, seed=0)
    fresh.set_state(arrays, info)
    got = fresh.collect(jnp.float32(1.0), 0.5, jax.random.key(1))
    ended = expected.terminated | expected.truncated

    def comparable(rollout):
        """The final rows of streams that go on are whatever the buffer held."""
        final_obs = jax.tree.map(lambda x: np.array(x)[ended], rollout.final_obs)
        return rollout._replace(final_obs=final_obs, final_action_mask=rollout.final_action_mask[ended])

    assert_equal(comparable(jax.tree.map(np.array, got)), comparable(expected))


def test_recurrent_state_goes_on_from_a_state():
    """It is there before the first batch is collected, and after."""

    def collector():
        return HostCollector(Tape(), lambda acting, obs, *others: act_as_carry_says(obs["inner"], *others), 4, seed=0)

    first, key = collector(), jax.random.key(0)
    first.collect(None, 0.0, key)
    state = first.get_state()
    expected = first.collect(None, 0.0, key)
    fresh, used = collector(), collector()
    used.collect(None, 0.0, key)
    used.collect(None, 0.0, key)
    assert expected.carry.any()
    for other in (fresh, used):
        other.set_state(*state)
        got = other.collect(None, 0.0, key)
        np.testing.assert_array_equal(got.carry, expected.carry)
        np.testing.assert_array_equal(got.action, expected.action)


def act_at_random(acting, obs, action_mask, carry, key):
    return jax.random.randint(key, (obs.shape[0],), 0, 2), carry


def test_collecting_goes_on_from_the_state_of_a_gymnasium_environment():
    def collector(seed):
        return HostCollector(gymnasium_environment("CartPole-v1", 2), act_at_random, 30, seed)

    first = collector(0)
    first.collect(None, 0.0, jax.random.key(0))
    arrays, info = first.get_state()
    expected = first.collect(None, 0.0, jax.random.key(1))
    other = collector(5)
    other.set_state(arrays, info)
    got = other.collect(None, 0.0, jax.random.key(1))
    assert expected.time[0].any()
    ended = expected.terminated | expected.truncated
    assert ended.any()
    for name in ("obs", "action", "reward", "terminated", "truncated", "valid", "time", "last_obs"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), err_msg=name)
    np.testing.assert_array_equal(got.final_obs[ended], expected.final_obs[ended])


class Count(gymnasium.Env):
    """Episodes of 3 steps; the only legal action is the number of steps so far."""

    observation_space = Dict(steps=Discrete(4), both=Dict(steps=Box(0.0, 3.0, (1,))))
    action_space = Discrete(4)

    def answer(self):
        obs = {"steps": self.steps, "both": {"steps": np.array([self.steps], np.float32)}}
        return obs, {"action_mask": np.arange(4) == self.steps}

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return self.answer()

    def step(self, action):
        assert action == self.steps
        self.steps += 1
        obs, info = self.answer()
        return obs, float(self.steps), self.steps == 3, False, info


def first_legal(acting, obs, action_mask, carry, key):
    return jnp.argmax(action_mask, axis=-1), carry


def test_a_vector_environment_that_spends_rows_on_resets():
    environment = VectorEnvironment(SyncVectorEnv([Count] * 2, autoreset_mode=AutoresetMode.NEXT_STEP), "count")
    collector = HostCollector(environment, first_legal, 10, seed=0)
    assert collector.get_state() is None
    rollout = collector.collect(None, 0.0, jax.random.key(0))
    for n in range(2):
        np.testing.assert_array_equal(rollout.obs["steps"][:, n], [0, 1, 2, 3, 0, 1, 2, 3, 0, 1])
        np.testing.assert_array_equal(rollout.valid[:, n], [1, 1, 1, 0, 1, 1, 1, 0, 1, 1])
        np.testing.assert_array_equal(rollout.time[:, n], [0, 1, 2, 0, 0, 1, 2, 0, 0, 1])
        np.testing.assert_array_equal(rollout.reward[:, n], [1, 2, 3, 0, 1, 2, 3, 0, 1, 2])
        np.testing.assert_array_equal(rollout.terminated[:, n], [0, 0, 1, 0, 0, 0, 1, 0, 0, 0])
        np.testing.assert_array_equal(rollout.action[rollout.valid[:, n], n], [0, 1, 2, 0, 1, 2, 0, 1])
        np.testing.assert_array_equal(rollout.final_obs["both"]["steps"][[2, 6], n], [[3], [3]])
        assert rollout.last_obs["steps"][n] == 2
    np.testing.assert_array_equal(rollout.last_action_mask, [[False, False, True, False]] * 2)
    environment.close()
