"""Gymnasium's three autoreset modes, and the serial loop, tell the learner the same story."""

import itertools
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from surefoot.envs.boundary import EnvironmentFault, EnvironmentWarning
from surefoot.envs.gymnasium import SerialEnvironment, VectorEnvironment, gymnasium_environment
from surefoot.math.returns import gae

MODES = list(AutoresetMode)


class Counter(gymnasium.Env):
    """Counts; episodes of 1 to 5 steps end in turn by termination, by truncation, by both. Observations are never repeated."""

    def __init__(self, first, mask=None, nested=False):
        box = spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.observation_space = spaces.Dict(outer=spaces.Dict(inner=box)) if nested else box
        if mask == "obs":
            self.observation_space = spaces.Dict(inner=box, action_mask=spaces.MultiBinary(3))
        self.action_space = spaces.Discrete(3)
        self.first, self.mask, self.nested, self.episode, self.count = first, mask, nested, -1, 0

    def answer(self):
        obs = np.array([1000.0 * self.first + self.episode, self.count])
        legal = np.array([1, self.count % 2, self.episode % 2], np.int8)
        if self.mask == "obs":
            return {"inner": obs, "action_mask": legal}, {}
        return {"outer": {"inner": obs}} if self.nested else obs, {"action_mask": legal} if self.mask else {}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode = 0 if seed is not None else self.episode + 1
        self.count = 0
        return self.answer()

    def step(self, action):
        self.count += 1
        is_end = self.count > (self.episode + self.first) % 5
        obs, info = self.answer()
        kind = self.episode % 3
        return obs, self.count + 0.25 * float(action), is_end and kind != 1, is_end and kind != 0, info


def environments(num_envs, **options):
    """The same N counters behind the serial loop and behind each of the three modes."""
    firsts = iter(range(num_envs))
    yield "serial", SerialEnvironment(lambda: Counter(next(firsts), **options), num_envs, "serial")
    for mode in MODES:
        makers = [lambda first=first: Counter(first, **options) for first in range(num_envs)]
        yield mode.value, VectorEnvironment(SyncVectorEnv(makers, autoreset_mode=mode), mode.value)


def leaf(obs, nested):
    return obs["outer"]["inner"] if nested else obs["inner"] if isinstance(obs, dict) else obs


def stories(env, num_transitions, nested=False):
    """For each stream its first transitions: observation, mask, action, reward, true successor, flags, successor's mask."""
    num_envs = env.spec.num_envs
    told = [[] for _ in range(num_envs)]
    obs, mask = env.reset(0)
    num_invalid = 0
    while min(map(len, told)) < num_transitions:
        obs, mask = leaf(obs, nested).copy(), None if mask is None else mask.copy()
        # Each stream's k-th action is the same whatever rows were spent on resets before it.
        action = np.array([len(story) % 3 for story in told])
        step = env.step(action)
        ended = step.terminated | step.truncated
        for index, story in enumerate(told):
            if not step.valid[index]:
                num_invalid += 1
                assert step.reward[index] == 0
                assert not ended[index]
                continue
            successor = (leaf(step.final_obs, nested) if ended[index] else leaf(step.obs, nested))[index].tolist()
            legal = None
            if mask is not None:
                legal = mask[index].tolist(), (step.final_action_mask if ended[index] else step.action_mask)[index].tolist()
            flags = bool(step.terminated[index]), bool(step.truncated[index])
            story.append((obs[index].tolist(), int(action[index]), float(step.reward[index]), successor, flags, legal))
        obs, mask = step.obs, step.action_mask
    return [story[:num_transitions] for story in told], num_invalid


@pytest.mark.parametrize("options", [{}, {"nested": True}, {"mask": "info"}, {"mask": "obs"}])
def test_every_mode_tells_the_same_transitions(options):
    nested = options.get("nested", False)
    told = {name: stories(env, 40, nested) for name, env in environments(4, **options)}
    reference, _ = told["serial"]
    for story in reference:
        kinds = {flags for *_, flags, _ in story}
        assert kinds == {(False, False), (True, False), (False, True), (True, True)}
        # A successor is what is acted on next, unless the episode ended.
        for (*_, successor, flags, _), (obs, *_) in itertools.pairwise(story):
            assert (successor == obs) is not any(flags)
    if "mask" in options:
        assert {sum(legal[0]) for story in reference for *_, legal in story} == {1, 2, 3}
    for name, (story, num_invalid) in told.items():
        assert story == reference, name
        assert (num_invalid > 0) is (name == AutoresetMode.NEXT_STEP.value)


def test_every_mode_gives_the_same_advantage_for_the_same_transition():
    advantages = {}
    for name, env in environments(3):
        rows = []
        obs, _ = env.reset(0)
        for _ in range(80):
            before = obs.copy()
            step = env.step(np.zeros(3, int))
            ended = (step.terminated | step.truncated)[:, None]
            successor = np.where(ended, step.final_obs, step.obs)
            rows.append([np.array(x) for x in (step.reward, before, successor, step.terminated, step.truncated, step.valid)])
            obs = step.obs
        reward, before, successor, terminated, truncated, valid = (np.stack(column) for column in zip(*rows, strict=True))
        value, next_value = (np.cos(x).sum(-1).astype(np.float32) for x in (before, successor))  # any function of the observation
        advantage = np.asarray(gae(reward, value, next_value, terminated, truncated, discount=0.9, gae_lambda=0.8))
        advantages[name] = [advantage[valid[:, n], n][:40] for n in range(3)]
    for name, streams in advantages.items():
        for stream, expected in zip(streams, advantages["serial"], strict=True):
            assert len(stream) == 40
            # The recurrence is evaluated as a tree, whose shape depends on where the rows stand.
            np.testing.assert_allclose(stream, expected, rtol=1e-5, atol=1e-5, err_msg=name)


def test_the_row_of_an_end_in_next_step_mode_carries_the_terminal_observation():
    env = VectorEnvironment(SyncVectorEnv([lambda: Counter(0)]), "counter")
    obs, _ = env.reset(0)
    assert obs.tolist() == [[0.0, 0.0]]
    step = env.step(np.array([0]))
    assert step.terminated[0]
    assert step.valid[0]
    assert step.obs.tolist() == step.final_obs.tolist() == [[0.0, 1.0]]
    step = env.step(np.array([2]))
    assert not step.valid[0]
    assert step.reward[0] == 0
    assert step.obs.tolist() == [[1.0, 0.0]]
    env.reset(0)
    assert env.step(np.array([0])).terminated[0]
    env.reset(0)  # a reset forgets that a row had ended
    assert env.step(np.array([0])).valid[0]


@pytest.mark.parametrize("mode", MODES)
def test_streams_are_seeded_as_in_the_serial_loop(mode):
    vector = gymnasium.make_vec("CartPole-v1", num_envs=3, vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode})
    env, serial = VectorEnvironment(vector, "CartPole"), gymnasium_environment("gymnasium:CartPole-v1", 3)
    np.testing.assert_array_equal(env.reset(4)[0], serial.reset(4)[0])
    for turn in range(20):  # no episode is over this soon, so that rows stay aligned
        step, expected = env.step(np.full(3, turn % 2)), serial.step(np.full(3, turn % 2))
        assert not expected.terminated.any()
        np.testing.assert_array_equal(step.obs, expected.obs)


def test_an_async_vector_environment():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fork and threads
        vector = gymnasium.make_vec("CartPole-v1", num_envs=2, vectorization_mode="async")
    env, serial = VectorEnvironment(vector, "CartPole"), gymnasium_environment("gymnasium:CartPole-v1", 2)
    np.testing.assert_array_equal(env.reset(4)[0], serial.reset(4)[0])
    for _ in range(8):
        np.testing.assert_array_equal(env.step(np.zeros(2, int)).obs, serial.step(np.zeros(2, int)).obs)
    env.close()


def test_gymnasiums_vectorised_cart_pole_counts_every_step_once():
    env = gymnasium_environment(gymnasium.make_vec("CartPole-v1", num_envs=4, vectorization_mode="vector_entry_point"), 4)
    env.reset(0)
    num_ended = num_invalid = 0
    ended = np.zeros(4, bool)
    for action in np.random.default_rng(0).integers(2, size=(300, 4)):
        step = env.step(action)
        assert (step.valid == ~ended).all()
        assert (step.reward == step.valid).all()
        ended = step.terminated | step.truncated
        num_ended, num_invalid = num_ended + ended.sum(), num_invalid + (~step.valid).sum()
    assert num_ended > 20
    assert num_ended - num_invalid == ended.sum()
    assert env.spec.resume == "episodes restart"
    assert env.get_state() is None


class Batched(VectorEnv):
    """Two streams that answer as told."""

    single_observation_space = spaces.Box(-10, 10, (2,), np.float32)
    single_action_space = spaces.Discrete(2)
    num_envs = 2

    def __init__(self, mode=AutoresetMode.SAME_STEP, **answer):
        self.metadata = {} if mode is None else {"autoreset_mode": mode}
        self.answer = {"obs": np.zeros((2, 2), np.float32), "reward": np.zeros(2), "ends": [False, False], "infos": {}} | answer
        self.is_closed = False

    def reset(self, *, seed=None, options=None):
        return np.zeros((2, 2), np.float32), {}

    def step(self, actions):
        if "raise" in self.answer:
            raise self.answer["raise"]
        return self.answer["obs"], self.answer["reward"], np.array(self.answer["ends"]), np.zeros(2, bool), self.answer["infos"]

    def close_extras(self):
        self.is_closed = True


@pytest.mark.parametrize("mode", [None, "sometimes"])
def test_a_mode_that_is_not_said_is_refused(mode):
    with pytest.raises(ValueError, match=r"does not say when it resets.*NEXT_STEP, SAME_STEP or DISABLED"):
        VectorEnvironment(Batched(mode), "batched")


def test_the_value_of_a_mode_is_a_mode():
    assert VectorEnvironment(Batched("NextStep"), "batched").spec.num_envs == 2


@pytest.mark.parametrize("final_obs", [np.array([None, np.ones(2)], dtype=object), np.ones((2, 2), np.float32)])
def test_final_observations_may_be_objects_or_a_batch(final_obs):
    env = VectorEnvironment(Batched(ends=[False, True], infos={"final_obs": final_obs}), "batched")
    env.reset(0)
    step = env.step(np.zeros(2, int))
    assert step.final_obs[1].tolist() == [1.0, 1.0]
    assert step.obs[1].tolist() == [0.0, 0.0]
    assert np.isfinite(step.final_obs).all()


def test_what_comes_with_a_row_spent_on_a_reset_is_dropped():
    env = VectorEnvironment(Batched(AutoresetMode.NEXT_STEP, reward=np.array([3.0, 4.0]), ends=[False, True]), "batched")
    env.reset(0)
    assert env.step(np.zeros(2, int)).reward.tolist() == [3.0, 4.0]
    step = env.step(np.zeros(2, int))
    assert step.valid.tolist() == [True, False]
    assert step.reward.tolist() == [3.0, 0.0]
    assert step.terminated.tolist() == [False, False]


def test_a_reset_of_some_rows_leaves_the_others():
    env = VectorEnvironment(Batched(AutoresetMode.DISABLED, obs=np.full((2, 2), 5, np.float32), ends=[False, True]), "batched")
    env.reset(0)
    step = env.step(np.zeros(2, int))
    assert step.obs.tolist() == [[5.0, 5.0], [0.0, 0.0]]
    assert step.final_obs[1].tolist() == [5.0, 5.0]


@pytest.mark.parametrize(
    ("answer", "texts"),
    [
        ({"obs": np.array([[0, 0], [0, np.nan]], np.float32)}, ["environment 1", "nan at [1]", "step 2"]),
        ({"obs": np.zeros((2, 3), np.float32)}, ["(2, 3)", "(2, 2)"]),
        ({"obs": np.zeros((1, 2), np.float32)}, ["(1, 2)", "(2, 2)"]),
        ({"reward": np.array([0.0, np.inf])}, ["environment 1", "reward is inf"]),
        ({"reward": 1.0}, ["reward is a float", "[2]"]),
        ({"reward": np.array(["1", "2"])}, ["reward is an array"]),
        ({"ends": [False, True]}, ["environment 1", "final_obs"]),
        ({"ends": [0, 1]}, ["terminated is an array"]),
        ({"ends": [True, True], "infos": {"final_obs": np.array([np.full(2, np.nan)] * 2)}}, ["environment 0", "nan"]),
        ({"raise": RuntimeError("gone")}, ["one of its environments", "RuntimeError: gone"]),
    ],
)
def test_faults_of_a_batch_are_refused_with_their_place(answer, texts):
    vector = Batched()
    env = VectorEnvironment(vector, "batched")
    env.reset(0)
    env.step(np.zeros(2, int))
    vector.answer |= answer
    with pytest.raises(EnvironmentFault) as caught:
        env.step(np.zeros(2, int))
    assert all(text in str(caught.value) for text in texts), str(caught.value)
    assert vector.is_closed
    assert caught.value.__cause__ is answer.get("raise")


def test_a_batch_outside_its_space_is_warned_of():
    env = VectorEnvironment(Batched(obs=np.array([[0, 0], [0, 11]], np.float32)), "batched")
    env.reset(0)
    with pytest.warns(EnvironmentWarning, match=r"environment 1, step 1: .*11\.0 at \[1\]"):
        env.step(np.zeros(2, int))


@pytest.mark.parametrize("mode", MODES)
def test_masks_without_a_legal_action_or_missing_are_refused(mode):
    class Stuck(Counter):
        def answer(self):
            obs, info = super().answer()
            if self.episode == 1 and self.count == 0:
                info = {} if self.missing else {"action_mask": np.zeros(3, np.int8)}
            return obs, info

    for missing, text in ((False, "no legal action"), (True, "mask is missing")):
        Stuck.missing = missing
        env = VectorEnvironment(SyncVectorEnv([lambda: Counter(3, "info"), lambda: Stuck(0, "info")], autoreset_mode=mode), "stuck")
        env.reset(0)
        env.step(np.zeros(2, int)) if mode is AutoresetMode.NEXT_STEP else None
        with pytest.raises(EnvironmentFault, match=rf"environment 1 .*{text}"):
            env.step(np.zeros(2, int))


@pytest.mark.parametrize("mode", MODES)
def test_a_terminal_state_needs_no_legal_action(mode):
    class Over(Counter):
        def answer(self):
            obs, info = super().answer()
            return obs, {"action_mask": np.zeros(3, np.int8)} if self.count == 1 else info

    env = VectorEnvironment(SyncVectorEnv([lambda: Over(0, "info")], autoreset_mode=mode), "over")
    env.reset(0)
    step = env.step(np.zeros(1, int))
    assert step.terminated[0]
    assert step.final_action_mask.all()
    assert step.action_mask.any()
