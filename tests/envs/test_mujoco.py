"""MuJoCo tasks on threads against Gymnasium's own, bit for bit: they hold both the tasks and the pinned version of MuJoCo."""

import dataclasses
import importlib.util
import re
import sys
import tomllib
import warnings
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
import pytest
from test_gymnasium import assert_resumes, through_files

from surefoot.envs import make
from surefoot.envs.boundary import EnvironmentFault, EnvironmentWarning, stream_seeds
from surefoot.envs.gymnasium import SerialEnvironment, gymnasium_environment
from surefoot.envs.mujoco import MujocoEnvironment, Unlogged
from surefoot.envs.mujoco_tasks import TASKS, effort, length


@pytest.fixture(autouse=True)
def _silent():
    """Gymnasium's own environments leave MuJoCo's log on, which would write into the working directory."""
    with Unlogged():
        yield


def random_actions(env, num_steps):
    space = env.spec.action_space
    space.seed(0)
    return [np.stack([space.sample() for _ in range(env.spec.num_envs)]) for _ in range(num_steps)]


def recorded(env):
    """What the tasks compute in float64, before it is written into float32 rows, newest last."""
    boundary, task, observed, rewards = env._boundary, env._task, [], []
    write_all = boundary.obs.write_all

    def keep_observation(obs):
        observed.append(obs)
        write_all(obs)

    def keep_reward(*arguments):
        rewards.append(task.reward(*arguments))
        return rewards[-1]

    boundary.obs.write_all, env._task = keep_observation, dataclasses.replace(task, reward=keep_reward)
    return observed, rewards


@pytest.mark.parametrize("name", TASKS)
def test_every_bit_is_gymnasiums(name):
    env = MujocoEnvironment(name, num_envs=2)
    theirs = [gymnasium.make(name, disable_env_checker=True) for _ in range(2)]
    assert (env.spec.observation_space, env.spec.action_space) == (theirs[0].observation_space, theirs[0].action_space)
    observed, rewards = recorded(env)
    obs, _ = env.reset(7)
    first = [one.reset(seed=seed)[0] for one, seed in zip(theirs, stream_seeds(7, 2), strict=True)]
    np.testing.assert_array_equal(observed[-1], first)
    np.testing.assert_array_equal(obs, np.array(first, np.float32))
    num_ended = 0
    for action in random_actions(env, 1000):
        observed.clear()
        step = env.step(action)
        for index, one in enumerate(theirs):
            true_obs, reward, terminated, truncated, _ = one.step(action[index])
            np.testing.assert_array_equal(observed[0][index], true_obs)
            assert rewards[-1][index] == reward
            assert step.reward[index] == np.float32(reward)
            assert (step.terminated[index], step.truncated[index]) == (terminated, truncated)
            if terminated or truncated:
                num_ended += 1
                np.testing.assert_array_equal(step.final_obs[index], true_obs.astype(np.float32))
                true_obs, _ = one.reset()
                np.testing.assert_array_equal(observed[-1][index], true_obs)
            np.testing.assert_array_equal(step.obs[index], true_obs.astype(np.float32))
    assert num_ended >= 2
    env.close()


EDGES = [0.1, -0.1, 0.2, -0.2, 0.7, 0.75, 0.8, 0.9, 1.0, -1.0, 1.5, 2.0, 10.0, -10.0, 100.0, -100.0, np.nan, np.inf]  # all bounds of tasks


@pytest.mark.parametrize("name", TASKS)
def test_formulas_are_gymnasiums_in_states_that_play_seldom_reaches(name):
    num_states = 1000
    task, data = TASKS[name], MujocoEnvironment(name, num_envs=1)._simulations.data
    theirs = gymnasium.make(name, disable_env_checker=True).unwrapped
    random = np.random.default_rng(0)
    action = theirs.action_space.high * random.uniform(-1, 1, (num_states, *data.ctrl.shape[1:])).astype(np.float32)

    def drawn():
        """One in thirty numbers is an edge, and one in two of those that heights and angles are."""
        fields = {}
        for field in ("qpos", "qvel", *task.fields):
            edge = random.choice(EDGES, (num_states, *getattr(data, field).shape[1:]))
            is_edge = random.uniform(size=edge.shape) < 1 / 30
            if field == "qpos":
                is_edge[:, 1:3] = random.uniform(size=(num_states, edge[:, 1:3].shape[1])) < 0.5
            fields[field] = np.where(is_edge, edge, random.normal(scale=0.3, size=edge.shape))
        # Costs of contact that reach their limit, and a height at which a double pendulum stands.
        fields |= {name: array * 1e3 for name, array in fields.items() if name == "cfrc_ext"}
        fields |= {name: array + 1.0 for name, array in fields.items() if name == "site_xpos"}
        return fields

    def put(fields, index):
        for field, array in fields.items():
            getattr(theirs.data, field)[...] = array[index]

    before, after = drawn(), drawn() | {"ctrl": action.astype(np.float64)}
    theirs.do_simulation = lambda control, num_steps: put(after, current)
    ours, ours_before = (type(data)(model=data.model, body=data.body, **fields) for fields in (after, before))
    with np.errstate(all="ignore"):
        alive = np.ones(num_states, bool) if task.alive is None else task.alive(ours)
        velocity = None if task.position is None else (task.position(ours) - task.position(ours_before)) / theirs.dt
        reward, obs = task.reward(ours, action, velocity, alive), task.observe(ours)
        for current in range(num_states):
            put(before, current)
            true_obs, true_reward, terminated, _, _ = theirs.step(action[current])
            np.testing.assert_array_equal(obs[current], true_obs)
            np.testing.assert_array_equal(reward[current], true_reward)
            assert alive[current] != terminated
    assert task.alive is None or 10 < alive.sum() < num_states - 10


def test_all_of_gymnasiums_tasks_with_their_time_limits():
    registered = {
        spec.id: spec.max_episode_steps
        for spec in gymnasium.registry.values()
        if isinstance(spec.entry_point, str) and re.match(r"gymnasium\.envs\.mujoco\.\w+_v5:", spec.entry_point)
    }
    assert {name: task.max_episode_steps for name, task in TASKS.items()} == registered


def test_the_pin_is_the_version_that_is_tested():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert f"mujoco=={mujoco.__version__}" in project["optional-dependencies"]["mujoco"]


@pytest.mark.parametrize("num_envs", [1, 2, 3, 8, 33])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sums_over_rows_round_as_sums_of_one_row(num_envs, dtype):
    random = np.random.default_rng(0)
    for size in (1, 2, 3, 6, 7, 8, 17, 84):
        for _ in range(30):
            rows = random.normal(size=(num_envs, size)).astype(dtype)
            np.testing.assert_array_equal(effort(rows), [np.sum(np.square(row)) for row in rows])
    for _ in range(100):
        rows = random.normal(size=(num_envs, 3))
        np.testing.assert_array_equal(length(rows), [np.linalg.norm(row) for row in rows])


@pytest.mark.parametrize("name", TASKS)
def test_a_resumed_run_goes_on_bit_for_bit(name):
    assert_resumes(lambda num_envs: MujocoEnvironment(name, num_envs))


@pytest.mark.parametrize("name", TASKS)
def test_gymnasiums_own_resumes_bit_for_bit(name):
    assert_resumes(lambda num_envs: gymnasium_environment(name, num_envs), num_envs=1, before=60, after=120)


@pytest.mark.parametrize("name", ["Hopper-v5", "Ant-v5"])
def test_the_number_of_threads_changes_no_bit(name):
    one, three = (MujocoEnvironment(name, num_envs=5, num_threads=n) for n in (1, 3))
    np.testing.assert_array_equal(one.reset(0)[0], three.reset(0)[0])
    num_ended = 0
    for action in random_actions(one, 100):
        a, b = one.step(action), three.step(action)
        np.testing.assert_array_equal(a.obs, b.obs)
        np.testing.assert_array_equal(a.reward, b.reward)
        num_ended += int(a.terminated.sum())
    assert num_ended or name == "Ant-v5"


def test_a_state_is_refused_where_the_number_of_environments_differs():
    env, more = MujocoEnvironment("Reacher-v5", 2), MujocoEnvironment("Reacher-v5", 3)
    env.reset(0)
    more.reset(0)
    state = through_files(env.get_state())
    with pytest.raises(ValueError, match=r"holds 2 environments .* this run has 3"):
        more.set_state(*state)


def spoilt(array, row):
    array = np.array(array)
    array[row] = np.nan
    return array


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda task: {"observe": lambda d: spoilt(task.observe(d), (1, 4))}, r"the observation is nan at \[4\]"),
        (lambda task: {"reward": lambda *arguments: spoilt(task.reward(*arguments), 1)}, "the reward is nan as float32"),
    ],
)
@pytest.mark.parametrize("name", ["Walker2d-v5", "HumanoidStandup-v5"])
def test_what_is_not_finite_is_refused_with_its_place(name, change, problem):
    env = MujocoEnvironment(name, num_envs=3)
    env.reset(7)
    first, second, third = random_actions(env, 3)
    env.step(first)
    env.step(second)
    env._task = dataclasses.replace(env._task, **change(env._task))
    with pytest.raises(EnvironmentFault, match=rf"{name}: environment 1 \(seed {stream_seeds(7, 3)[1]}\), step 3: {problem}\."):
        env.step(third)


def test_an_error_in_the_pool_names_its_environment(monkeypatch):
    from mujoco.batch import Batch, SimulationError

    def fails(self, ids, num_failed):
        raise SimulationError(np.array([1]), "stack overflow", 3)

    env = MujocoEnvironment("Walker2d-v5", num_envs=3)
    env.reset(7)
    monkeypatch.setattr(Batch, "_check", fails)
    with pytest.raises(EnvironmentFault, match=r"environment 1 \(seed \d+\), step 1: it raised SimulationError: .*stack overflow"):
        env.step(np.zeros((3, 6)))


def test_an_error_in_the_loop_names_its_environment_and_ends_its_threads(monkeypatch):
    env = MujocoEnvironment("Ant-v5", num_envs=3, num_threads=2)
    env.reset(7)
    broken, step = env._simulations._simulations[2], mujoco.mj_step

    def fails(model, data, num_steps):
        if data is broken:
            raise mujoco.FatalError("stack overflow")
        step(model, data, num_steps)

    monkeypatch.setattr(mujoco, "mj_step", fails)
    with pytest.raises(EnvironmentFault, match=r"environment 2 \(seed \d+\), step 1: it raised FatalError: stack overflow"):
        env.step(np.zeros((3, 8)))
    with pytest.raises(RuntimeError, match="after shutdown"):
        env._simulations._threads.submit(print)


@pytest.mark.parametrize("name", ["HalfCheetah-v5", "Ant-v5"])
def test_warnings_of_mujoco_reach_neither_screen_nor_directory(name, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    loud = mujoco.MjLogConfig.get()
    loud.logto_console = loud.logto_file = True
    loud.set()
    env = MujocoEnvironment(name, num_envs=2)  # the model of HalfCheetah has an attribute that is deprecated
    env.reset(0)
    arrays, info = env.get_state()
    arrays["simulations"][:, 5] = 1e30  # an unstable simulation
    env.set_state(arrays, info)
    env.step(np.zeros((2, *env.spec.action_space.shape)))
    assert list(tmp_path.iterdir()) == []
    assert "".join(capfd.readouterr()) == ""
    assert mujoco.MjLogConfig.get().logto_console
    assert mujoco.MjLogConfig.get().logto_file


def test_an_id_runs_on_threads_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        environment, spec = make("HalfCheetah-v5", 2)
    assert isinstance(environment, MujocoEnvironment)
    assert (spec.name, spec.num_envs, spec.resume) == ("HalfCheetah-v5", 2, "exact")


def slow_cheetah():
    return gymnasium.make("HalfCheetah-v5", frame_skip=1)


@pytest.mark.parametrize("env", ["gymnasium:HalfCheetah-v5", slow_cheetah])
def test_anything_but_the_id_runs_in_gymnasiums_loop_with_a_word(env):
    with pytest.warns(EnvironmentWarning, match=r"one environment at a time.*'HalfCheetah-v5' gives the same environment"):
        environment, _ = make(env, 2)
    assert isinstance(environment, SerialEnvironment)


def test_an_old_mujoco_runs_in_gymnasiums_loop_with_a_word(monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco.batch", None)
    with pytest.warns(EnvironmentWarning, match=r"needs MuJoCo 3\.17 or newer.*surefoot\[mujoco\]"):
        environment, _ = make("Hopper-v5", 2)
    assert isinstance(environment, SerialEnvironment)


def test_without_mujoco_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'Hopper-v5 needs MuJoCo.*pip install "surefoot\[mujoco\]"'):
        make("Hopper-v5", 2)
