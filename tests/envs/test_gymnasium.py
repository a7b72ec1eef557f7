"""The serial loop over Gymnasium environments: what it hands on, what it refuses, and that it can be stopped and resumed."""

import io
import json
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from surefoot.envs.boundary import EnvironmentFault, EnvironmentWarning, stream_seeds
from surefoot.envs.gymnasium import SerialEnvironment, gymnasium_environment


class Scripted(gymnasium.Env):
    """Counts its steps in an episode; `answers` maps a step (1, 2, ...; 0 is the reset) to changes of what is returned."""

    def __init__(self, answers=None, length=5, observation_space=None, action_space=None):
        self.observation_space = observation_space or spaces.Box(-100.0, 100.0, (2,), np.float32)
        self.action_space = action_space or spaces.Discrete(2)
        self.answers, self.length, self.count, self.closed = answers or {}, length, 0, False
        self.given = []

    def observe(self):
        return np.array([self.count, self.np_random.uniform()], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        change = self.answers.get(0, {})
        return change.get("obs", self.observe()), change.get("info", {})

    def step(self, action):
        self.count += 1
        self.given.append(action)
        change = self.answers.get(self.count, {})
        if "raise" in change:
            raise change["raise"]
        answer = {"obs": self.observe(), "reward": 1.0, "terminated": self.count >= self.length, "truncated": False, "info": {}} | change
        return answer["obs"], answer["reward"], answer["terminated"], answer["truncated"], answer["info"]

    def close(self):
        self.closed = True


def serial(make, num_envs=1):
    return SerialEnvironment(make, num_envs, "scripted")


def play(env, num_steps):
    """The last of `num_steps` steps with the action 0."""
    action = np.zeros((env.spec.num_envs, *env.spec.action_space.shape), env.spec.action_space.dtype)
    for _ in range(num_steps):
        step = env.step(action)
    return step


def failure(make, num_envs=3, num_steps=3):
    """The fault that one of N environments causes; all of them must be closed then."""
    built = []

    def build():
        built.append(make(len(built)))
        return built[-1]

    def run():
        env = serial(build, num_envs)
        env.reset(7)
        play(env, num_steps)

    with pytest.raises(EnvironmentFault) as caught:
        run()
    assert all(env.closed for env in built)
    return caught.value


def second_is(**change):
    """A maker whose environment 1 answers its step 3 with `change`."""
    return lambda index: Scripted({3: change} if index == 1 else None)


# What is handed on


def test_it_steps_exactly_as_gymnasium_does():
    env, seeds = gymnasium_environment("CartPole-v1", 3), stream_seeds(11, 3)
    twins = [gymnasium.make("CartPole-v1") for _ in range(3)]
    current = np.stack([twin.reset(seed=seed)[0] for twin, seed in zip(twins, seeds, strict=True)])
    obs, mask = env.reset(11)
    assert mask is None
    assert obs.dtype == np.float32
    np.testing.assert_array_equal(obs, current)
    generator, num_ended = np.random.default_rng(0), 0
    for _ in range(200):
        action = generator.integers(2, size=3)
        step = env.step(action)
        for index, twin in enumerate(twins):
            successor, reward, terminated, truncated, _ = twin.step(action[index])
            assert (step.reward[index], step.terminated[index], step.truncated[index]) == (reward, terminated, truncated)
            if terminated or truncated:
                num_ended += 1
                np.testing.assert_array_equal(step.final_obs[index], successor)
                successor, _ = twin.reset()
            np.testing.assert_array_equal(step.obs[index], successor)
        assert step.valid.all()
    assert num_ended > 10


def test_the_end_of_an_episode_shows_successor_and_new_beginning():
    env = serial(lambda: Scripted(length=2), 2)
    env.reset(0)
    env.step(np.zeros(2, int))
    step = env.step(np.zeros(2, int))
    assert step.terminated.all()
    assert not step.truncated.any()
    assert step.final_obs[:, 0].tolist() == [2.0, 2.0]
    assert step.obs[:, 0].tolist() == [0.0, 0.0]


def test_terminated_and_truncated_stay_apart():
    both = {1: {"terminated": True, "truncated": True}}
    env = serial(lambda: Scripted(both), 1)
    env.reset(0)
    step = play(env, 1)
    assert step.terminated.tolist() == [True]
    assert step.truncated.tolist() == [True]
    assert step.final_obs[0, 0] == 1.0
    env = serial(lambda: Scripted({1: {"terminated": np.False_, "truncated": np.True_}}), 1)
    env.reset(0)
    step = play(env, 1)
    assert step.terminated.tolist() == [False]
    assert step.truncated.tolist() == [True]


def test_an_environment_that_never_ends_runs():
    env = serial(lambda: Scripted(length=10**9))
    env.reset(0)
    assert not play(env, 50).terminated.any()


def test_observations_of_every_space_are_stored_in_the_dtype_of_the_learner():
    space = spaces.Dict(
        wide=spaces.Box(-1, 1, (2,), np.float64),
        image=spaces.Box(0, 255, (2, 2, 1), np.uint8),
        nested=spaces.Dict(count=spaces.Discrete(3, start=5)),
        pair=spaces.Tuple((spaces.Discrete(2), spaces.Box(-9, 9, (1,), np.int64))),
    )
    obs = {
        "wide": np.array([0.1, 0.2]),
        "image": np.full((2, 2, 1), 7, np.uint8),
        "nested": {"count": 6},
        "pair": (np.int64(1), np.array([-4])),
    }
    env = serial(lambda: Scripted({0: {"obs": obs}}, observation_space=space), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, _ = env.reset(0)
    assert first["wide"].dtype == np.float32
    assert first["wide"].shape == (2, 2)
    assert first["image"].dtype == np.uint8
    assert (first["image"] == 7).all()
    assert first["nested"]["count"].tolist() == [6, 6]
    assert first["nested"]["count"].dtype == np.int32
    assert first["pair"]["0"].tolist() == [1, 1]
    assert first["pair"]["1"].tolist() == [[-4], [-4]]
    assert env.spec.observation_space["pair"]["0"] == spaces.Discrete(2)


def test_actions_arrive_in_the_units_and_type_of_the_space():
    built = []

    def build(space):
        built.append(Scripted(action_space=space))
        return built[-1]

    env = serial(lambda: build(spaces.Discrete(3, start=2)), 2)
    env.reset(0)
    env.step(np.array([2, 4], np.int32))
    assert [one.given for one in built] == [[2], [4]]
    assert type(built[0].given[0]) is np.int64
    built.clear()
    env = serial(lambda: build(spaces.Box(-1, 1, (2,), np.float32)), 1)
    env.reset(0)
    action = np.array([[0.5, -0.5]], np.float32)
    env.step(action)
    action[:] = 9.0
    assert built[0].given[0].tolist() == [0.5, -0.5]
    assert built[0].given[0].dtype == np.float32
    with pytest.raises(ValueError, match=r"shape \(2, 2\), expected \(1, 2\)"):
        env.step(np.zeros((2, 2)))
    with pytest.raises(EnvironmentFault, match=r"environment 0 .*the policy gave the action \[nan"):
        env.step(np.full((1, 2), np.nan))


def test_each_stream_has_its_own_seed_and_fewer_streams_have_the_first_of_them():
    obs, _ = serial(Scripted, 4).reset(3)
    fewer, _ = serial(Scripted, 2).reset(3)
    other, _ = serial(Scripted, 2).reset(4)
    assert len(set(obs[:, 1].tolist())) == 4
    assert fewer[:, 1].tolist() == obs[:2, 1].tolist() != other[:, 1].tolist()


# Action masks


def test_masks_from_info():
    env = gymnasium_environment("Taxi-v4", 2)
    twin = gymnasium.make("Taxi-v4")
    assert env.spec.has_action_mask
    _, mask = env.reset(5)
    _, info = twin.reset(seed=stream_seeds(5, 2)[0])
    assert mask.dtype == bool
    assert mask.shape == (2, 6)
    assert mask[0].tolist() == info["action_mask"].astype(bool).tolist()
    generator = np.random.default_rng(0)
    for _ in range(250):
        action = np.array([generator.choice(np.flatnonzero(row)) for row in mask])
        step = env.step(action)
        _, _, terminated, truncated, info = twin.step(action[0])
        if terminated or truncated:
            assert step.final_action_mask[0].tolist() == info["action_mask"].astype(bool).tolist()
            _, info = twin.reset()
        mask = step.action_mask
        assert mask[0].tolist() == info["action_mask"].astype(bool).tolist()
    assert step.final_action_mask.any(axis=1).all()


def test_a_mask_in_the_observation_is_taken_out_of_it():
    space = spaces.Dict(action_mask=spaces.MultiBinary(2), state=spaces.Discrete(9))
    answers = {0: {"obs": {"state": 1, "action_mask": np.array([1, 0], np.int8)}}}
    answers |= {1: {"obs": {"state": 2, "action_mask": np.array([0, 1], np.int8)}}}
    answers |= {2: {"obs": {"state": 3, "action_mask": np.array([1, 1], np.int8)}, "truncated": True}}
    env = serial(lambda: Scripted(answers, observation_space=space))
    assert env.spec.observation_space == spaces.Dict(state=spaces.Discrete(9))
    assert env.spec.has_action_mask
    obs, mask = env.reset(0)
    assert obs["state"].tolist() == [1]
    assert mask.tolist() == [[True, False]]
    assert "action_mask" not in obs
    assert play(env, 1).action_mask.tolist() == [[False, True]]
    step = play(env, 1)
    assert step.final_action_mask.tolist() == [[True, True]]
    assert step.action_mask.tolist() == [[True, False]]


def masked(answers):
    good = {"info": {"action_mask": np.array([1, 1], np.int8)}}
    return lambda index: Scripted(dict.fromkeys(range(5), good) | (answers if index == 1 else {}), length=5)


def test_masks_that_cannot_be_used_are_refused():
    assert "environment 1" in str(fault := failure(masked({2: {"info": {"action_mask": np.array([0, 0])}}})))
    assert "step 2" in str(fault)
    assert "no legal action" in str(fault)
    assert "mask is missing" in str(failure(masked({2: {}})))
    assert "expected 2 entries" in str(failure(masked({2: {"info": {"action_mask": np.ones(3, bool)}}})))
    assert "expected 2 entries" in str(failure(masked({2: {"info": {"action_mask": np.array([0.0, 1.0])}}})))
    empty_and_cut = {2: {"info": {"action_mask": np.array([0, 0])}, "truncated": True}}
    assert "no legal action" in str(failure(masked(empty_and_cut)))


@pytest.mark.parametrize("info", [{}, {"action_mask": np.zeros(2, np.int8)}])
def test_a_terminal_state_needs_no_legal_action(info):
    env = serial(lambda: masked({2: {"info": info, "terminated": True}})(1))
    env.reset(0)
    step = play(env, 2)
    assert step.terminated.all()
    assert step.final_action_mask.all()
    assert step.action_mask.all()


def test_a_mask_for_actions_that_have_none_is_said_to_be_ignored():
    space = spaces.Box(-1, 1, (1,))
    with pytest.warns(EnvironmentWarning, match="ignored"):
        env = serial(lambda: Scripted({0: {"info": {"action_mask": np.ones(2)}}}, action_space=space))
    assert not env.spec.has_action_mask


# What is refused


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_non_finite_observation_is_refused_with_its_place(value):
    text = str(failure(second_is(obs=np.array([0.0, value], np.float32))))
    assert f"environment 1 (seed {stream_seeds(7, 3)[1]})" in text
    assert "step 3" in text
    assert f"{value} at [1]" in text


def test_a_non_finite_terminal_observation_is_refused():
    assert "nan at [0]" in str(failure(second_is(obs=np.array([np.nan, 0.0], np.float32), terminated=True)))


def test_a_nan_in_one_leaf_names_the_leaf():
    space = spaces.Dict(a=spaces.Dict(b=spaces.Box(-1, 1, (1,)), c=spaces.Box(-1, 1, (1,))))
    good = {"obs": {"a": {"b": np.zeros(1), "c": np.zeros(1)}}}
    bad = {"obs": {"a": {"b": np.zeros(1), "c": np.array([np.nan])}}}
    text = str(failure(lambda index: Scripted({0: good, 1: good, 2: bad if index == 2 else good, 3: good}, observation_space=space)))
    assert "environment 2" in text
    assert "step 2" in text
    assert "'a/c'" in text


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e39])
def test_a_non_finite_reward_is_refused(value):
    text = str(failure(second_is(reward=value)))
    assert "environment 1" in text
    assert "step 3" in text
    assert "reward" in text


@pytest.mark.parametrize("value", ["1.0", None, np.zeros(2), np.zeros(1), 1j, [1.0]])
def test_a_reward_that_is_not_one_number_is_refused(value):
    text = str(failure(second_is(reward=value)))
    named = "None" if value is None else type(value).__name__ if not isinstance(value, np.ndarray) else str(value.shape)
    assert "environment 1" in text
    assert named in text


def test_rewards_of_every_number_type_are_taken():
    for value in (2, np.float64(2), np.float32(2), np.int64(2), np.array(2.0), np.uint8(2)):
        env = serial(lambda value=value: Scripted({1: {"reward": value}}))
        env.reset(0)
        assert play(env, 1).reward.tolist() == [2.0]


def test_a_flag_that_is_not_one_truth_value_is_refused():
    assert "terminated is None" in str(failure(second_is(terminated=None)))
    assert "truncated is an array" in str(failure(second_is(truncated=np.array([True]))))


@pytest.mark.parametrize("obs", [np.zeros(3, np.float32), np.zeros((1, 2), np.float32), np.zeros(1, np.float32), np.float32(0.0)])
def test_a_changed_shape_is_refused_and_never_broadcast(obs):
    text = str(failure(second_is(obs=obs)))
    assert "environment 1" in text
    assert str(obs.shape) in text
    assert "(2,)" in text


def test_other_observations_than_the_space_says_are_refused():
    assert "wants numbers" in str(failure(second_is(obs=None)))
    assert "wants numbers" in str(failure(second_is(obs="text")))
    space = spaces.Dict(a=spaces.Discrete(2), b=spaces.Discrete(2))
    assert "lacks 'b'" in str(failure(lambda index: Scripted({0: {"obs": {"a": 1}}}, observation_space=space)))


def test_the_old_api_is_named():
    class OldStep(Scripted):
        def step(self, action):
            return self.observe(), 1.0, False, {}

    class OldReset(Scripted):
        def reset(self, *, seed=None, options=None):
            return self.observe()

    class Unseeded(Scripted):
        def reset(self):
            return self.observe(), {}

    class Other:
        def step(self, action):
            return 0

    assert "returned 4 values" in str(failure(lambda index: OldStep()))
    assert "old Gym" in str(failure(lambda index: OldStep()))
    assert "old Gym" in str(failure(lambda index: OldReset()))
    assert "does not take a seed" in str(failure(lambda index: Unseeded()))
    env = serial(lambda: gymnasium.wrappers.TimeLimit(OldStep(), 10))
    env.reset(0)
    with pytest.raises(EnvironmentFault, match="old Gym"):
        play(env, 1)
    with pytest.raises(EnvironmentFault, match="old Gym"):
        gymnasium_environment(Other, 1)


def test_an_exception_names_the_environment_and_keeps_its_traceback():
    cause = KeyError("lost")
    fault = failure(second_is(**{"raise": cause}))
    assert fault.__cause__ is cause
    assert cause.__traceback__ is not None
    assert f"environment 1 (seed {stream_seeds(7, 3)[1]}), step 3: it raised KeyError: 'lost'" in str(fault)


def test_an_exception_at_reset_is_a_fault():
    class Breaks(Scripted):
        def reset(self, *, seed=None, options=None):
            raise RuntimeError("no licence")

    with pytest.raises(EnvironmentFault, match="first reset: it raised RuntimeError: no licence") as caught:
        serial(Breaks)
    assert isinstance(caught.value.__cause__, RuntimeError)


# What is warned of


def warnings_of(make, num_steps=6):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        env = serial(make, 2)
        env.reset(0)
        step = play(env, num_steps)
    return [str(one.message) for one in caught], step


def test_an_observation_outside_its_space_is_warned_of_once():
    space = spaces.Box(-1.0, 1.0, (2,), np.float32)
    texts, step = warnings_of(lambda: Scripted(observation_space=space))
    assert len(texts) == 1
    assert "environment 0, step 2" in texts[0]
    assert "2.0 at [0]" in texts[0]
    assert "[-1.0, 1.0]" in texts[0]
    assert np.isfinite(step.obs).all()


def test_a_category_outside_its_space_is_warned_of():
    texts, _ = warnings_of(lambda: Scripted({n: {"obs": n} for n in range(6)}, observation_space=spaces.Discrete(3, start=1)))
    assert len(texts) == 1
    assert "0, outside its space's [1, 3]" in texts[0]


def test_a_bound_of_another_precision_is_inside():
    space = spaces.Box(-0.1, 0.1, (2,), np.float64)
    texts, _ = warnings_of(lambda: Scripted({n: {"obs": np.array([0.1, -0.1])} for n in range(6)}, observation_space=space))
    assert texts == []


@pytest.mark.parametrize(
    ("space", "obs"),
    [
        (spaces.Box(-9, 9, (2,), np.float32), np.array([1, 2])),
        (spaces.Box(0, 255, (2,), np.uint8), np.array([1, 2])),
        (spaces.Box(0, 255, (2,), np.uint8), np.array([1.0, 2.0])),
    ],
)
def test_a_wrong_dtype_is_cast_with_one_warning(space, obs):
    texts, step = warnings_of(lambda: Scripted({n: {"obs": obs} for n in range(6)}, observation_space=space))
    assert len(texts) == 1
    assert f"dtype {obs.dtype}" in texts[0]
    assert step.obs.tolist() == [[1, 2], [1, 2]]


@pytest.mark.parametrize(
    ("space", "obs"),
    [
        (spaces.Box(0, 255, (2,), np.uint8), np.array([0.5, 1.0])),
        (spaces.Box(0, 255, (2,), np.uint8), np.array([256, 1])),
        (spaces.Box(0, 2**40, (2,), np.int64), np.array([2**33, 1])),
        (spaces.Box(0, 9, (2,), np.int64), np.array([np.nan, 1])),
    ],
)
def test_a_cast_that_loses_something_is_refused(space, obs):
    with pytest.raises(EnvironmentFault, match="cannot hold"):
        serial(lambda: Scripted({0: {"obs": obs}}, observation_space=space))


def test_a_reset_that_ignores_its_seed_lowers_the_promise():
    class Ignores(Scripted):
        def observe(self):
            return np.array([0.0, np.random.default_rng().uniform()], np.float32)

        def get_state(self):
            return {}, {}

        def set_state(self, arrays, info): ...

    with pytest.warns(EnvironmentWarning, match="ignores its seed"):
        env = serial(Ignores)
    assert env.spec.resume == "episodes restart"
    assert env.get_state() is None


# Stopping and resuming


def through_files(state):
    """The state as a checkpoint would give it back: arrays through npz, the rest through JSON text."""
    arrays, info = state
    file = io.BytesIO()
    np.savez(file, **arrays)
    file.seek(0)
    with np.load(file, allow_pickle=False) as loaded:
        return {name: loaded[name] for name in loaded.files}, json.loads(json.dumps(info))


def assert_resumes(make, num_envs=2, before=137, after=500):
    """500 steps after a resume in fresh environments equal those of the run that went on, bit for bit."""
    env = make(num_envs)
    assert env.spec.resume == "exact"
    env.reset(3)
    space = env.spec.action_space
    space.seed(0)
    actions = [np.stack([space.sample() for _ in range(num_envs)]) for _ in range(before + after)]
    for action in actions[:before]:
        env.step(action)
    state = through_files(env.get_state())
    resumed = make(num_envs)
    resumed.reset(99)
    for _ in range(2):  # twice, so that a state which is written to by the steps after it would be noticed
        for action in actions[:20]:
            resumed.step(action)
        resumed.set_state(*state)
    num_ended = 0
    for action in actions[before:]:
        old, new = env.step(action), resumed.step(action)
        num_ended += int((old.terminated | old.truncated).sum())
        rows = old.terminated | old.truncated
        for a, b in ((old.obs, new.obs), (old.reward, new.reward), (old.terminated, new.terminated), (old.truncated, new.truncated)):
            assert_same(a, b, slice(None))
        assert_same(old.final_obs, new.final_obs, rows)
        assert_same(old.action_mask, new.action_mask, slice(None))
    return num_ended


def assert_same(a, b, rows):
    if isinstance(a, dict):
        for key in a:
            assert_same(a[key], b[key], rows)
    elif a is not None:
        assert a.dtype == b.dtype
        assert a[rows].tobytes() == b[rows].tobytes()


@pytest.mark.parametrize(
    "name",
    [
        "CartPole-v1",
        "Pendulum-v1",
        "Acrobot-v1",
        "MountainCar-v0",
        "MountainCarContinuous-v0",
        "FrozenLake-v1",
        "Taxi-v4",
        "CliffWalking-v1",
        "Blackjack-v1",
    ],
)
def test_resuming_is_exact(name):
    # A short time limit, so that episodes end in each of them; CliffWalking has none of its own.
    num_ended = assert_resumes(lambda n: gymnasium_environment(lambda: gymnasium.make(name, max_episode_steps=90), n))
    assert num_ended >= 10


def test_resuming_a_stochastic_taxi_through_stateless_wrappers():
    def make():
        taxi = gymnasium.make("Taxi-v4", is_rainy=True, fickle_passenger=True, max_episode_steps=40)
        return gymnasium.wrappers.FlattenObservation(taxi)

    assert assert_resumes(lambda n: gymnasium_environment(make, n)) >= 20


def test_what_is_seldom_set_is_saved_too():
    envs = [gymnasium_environment(lambda: gymnasium.make("Taxi-v4", fickle_passenger=True).unwrapped, 1) for _ in range(2)]
    for env, fickle in zip(envs, (True, False), strict=True):
        env.reset(0)
        env._envs[0].fickle_step = fickle
    envs[1].set_state(*through_files(envs[0].get_state()))
    assert envs[1]._envs[0].fickle_step is True


class Savable(Scripted):
    """Remembers something of its own across episodes."""

    total = 0.0

    def observe(self):
        self.total += self.np_random.uniform()
        return np.array([self.count, self.total % 1.0], np.float32)

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.total = 0.0
        return super().reset(seed=seed)

    def get_state(self):
        return {"total": np.array([self.total])}, {"count": self.count}

    def set_state(self, arrays, info):
        self.total, self.count = float(arrays["total"][0]), info["count"]


def test_an_environment_may_give_its_own_state():
    assert assert_resumes(lambda n: serial(lambda: Savable(length=7), n)) > 100
    assert assert_resumes(lambda n: serial(lambda: gymnasium.wrappers.TimeLimit(Savable(length=70), 30), n)) > 20


def test_what_cannot_be_saved_says_so():
    class Unjust(Savable):
        def get_state(self):
            return {"what": np.array([object()])}, {}

    class CartPoleWithMemory(gymnasium.envs.classic_control.CartPoleEnv):
        pass

    makers = [
        Scripted,
        Unjust,
        CartPoleWithMemory,
        lambda: gymnasium.wrappers.TimeAwareObservation(gymnasium.make("CartPole-v1")),
        lambda: gymnasium.wrappers.NormalizeReward(gymnasium.make("CartPole-v1")),
    ]
    for make in makers:
        env = serial(make)
        assert env.spec.resume == "episodes restart"
        assert env.get_state() is None


def test_a_state_of_another_number_of_environments_is_refused():
    env = gymnasium_environment("CartPole-v1", 2)
    env.reset(0)
    with pytest.raises(ValueError, match="holds 2 environments, and this run has 3"):
        gymnasium_environment("CartPole-v1", 3).set_state(*env.get_state())


# The door


def make_scripted():
    return Scripted()


def test_an_environment_is_an_id_a_factory_a_callable_or_a_vector():
    assert gymnasium_environment("gymnasium:CartPole-v1", 2).spec.name == "gymnasium:CartPole-v1"
    assert gymnasium_environment("gymnasium.envs.classic_control:PendulumEnv", 1).spec.action_space.shape == (1,)
    assert gymnasium_environment(make_scripted, 2).spec.name.endswith(":make_scripted")
    assert gymnasium_environment(Scripted(), 1).spec.num_envs == 1
    assert gymnasium_environment(gymnasium.make_vec("CartPole-v1", num_envs=2), 2).spec.num_envs == 2
    assert gymnasium_environment(lambda: gymnasium.make_vec("CartPole-v1", num_envs=3), None).spec.num_envs == 3


def test_a_name_that_nobody_knows_is_refused_with_its_neighbours():
    with pytest.raises(ValueError, match=r"Did you mean .*CartPole-v1"):
        gymnasium_environment("CartPol-v1", 1)
    with pytest.raises(ValueError, match="no environment 'gymnasium:Nonsense-v7'"):
        gymnasium_environment("gymnasium:Nonsense-v7", 1)
    with pytest.raises(ValueError, match="no_such_module"):
        gymnasium_environment("no_such_module:make", 1)


def test_other_mistakes_at_the_door_are_refused():
    shared = Scripted()
    with pytest.raises(ValueError, match="same object"):
        gymnasium_environment(lambda: shared, 2)
    with pytest.raises(ValueError, match="one environment, and 2 are to run"):
        gymnasium_environment(shared, 2)
    with pytest.raises(ValueError, match="give a Gymnasium id"):
        gymnasium_environment(3, 1)
    with pytest.raises(ValueError, match="at least one"):
        gymnasium_environment("CartPole-v1", 0)
    with pytest.raises(ValueError, match=r"holds 2 environments, and num_envs is 3"):
        gymnasium_environment(gymnasium.make_vec("CartPole-v1", num_envs=2), 3)
    with pytest.raises(ValueError, match="unbounded"):
        gymnasium_environment(lambda: Scripted(action_space=spaces.Box(-np.inf, np.inf, (1,))), 1)


def test_environments_with_different_spaces_are_refused_with_both():
    sizes = iter([2, 3])
    built = []

    def make():
        built.append(Scripted(action_space=spaces.Discrete(next(sizes))))
        return built[-1]

    with pytest.raises(ValueError, match=r"environment 1 is Discrete\(3\), that of environment 0 is Discrete\(2\)"):
        gymnasium_environment(make, 2)
    assert all(env.closed for env in built)


def test_a_missing_package_is_named():
    def make():
        raise gymnasium.error.DependencyNotInstalled('not installed, run `pip install "gymnasium[box2d]"`')

    with pytest.raises(ValueError, match=r'pip install "gymnasium\[box2d\]"\.$'):
        gymnasium_environment(make, 1)


def test_gymnasium_is_quiet_and_others_are_heard():
    def make():
        gymnasium.logger.warn("noise")
        warnings.warn("mine", stacklevel=1)
        return Scripted()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        filters = list(warnings.filters)
        gymnasium_environment(make, 1).reset(0)
        assert warnings.filters == filters
    assert {str(one.message) for one in caught} == {"mine"}
