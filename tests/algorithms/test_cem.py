"""The cross-entropy method: which candidate plays which episode, however batches cut them, and what the next generation is."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import FLOATS, batches_of, experience, part, with_reset_rows
from gymnasium.spaces import Box, Discrete
from support import Walk, bits, metrics

import surefoot as sf
from surefoot.algorithms import cem
from surefoot.algorithms.cem import CEM, vector_of
from surefoot.collect import scan_rollout, start_stream
from surefoot.distributions import MASKED_LOGIT
from surefoot.normalise import normalise
from surefoot.types import EnvironmentSpec

pytestmark = pytest.mark.usefixtures("x64")

SPEC = EnvironmentSpec("floats", FLOATS, Discrete(3), 2)
CONTINUOUS = EnvironmentSpec("floats", FLOATS, Box(-1.0, 1.0, (2,), np.float64), 2)
Small = partial(CEM, population=5, elite_fraction=0.4, num_steps=8, gamma=0.9)
KEY = jax.random.key(3)

update = jax.jit(lambda config, state, rollout: cem.update(config, state, rollout, None, KEY), static_argnums=0)


def first_state(config, spec=SPEC):
    return cem.init(config, spec, jax.random.key(0))


def noise_of(candidates):
    return np.asarray(jax.random.normal(KEY, candidates.shape))


class Reference:
    """The same method in loops: one dictionary for each episode that is under way."""

    def __init__(self, config, state):
        self.config, self.candidates = config, np.asarray(state.acting.candidates)
        self.mean = np.asarray(vector_of(state.acting.actor)[0])
        self.std, self.generation = np.asarray(state.std), 0
        self.queue, self.under_way = list(range(config.population)), {}
        self.begin_generation()

    def begin_generation(self):
        self.begun = [0] * self.config.population
        self.returns = [[] for _ in self.begun]

    def learn(self, rollout):
        config = self.config
        for t in range(len(rollout.time)):
            for n in range(rollout.time.shape[1]):
                if not rollout.valid[t, n]:
                    continue
                if rollout.time[t, n] == 0:
                    forgotten = self.under_way.pop(n, None)
                    if forgotten is not None:
                        self.begun[forgotten["candidate"]] -= 1
                    candidate = self.queue[n]
                    if self.begun[candidate] < config.episodes:
                        self.begun[candidate] += 1
                        self.under_way[n] = {"candidate": candidate, "return": 0.0}
                if n in self.under_way:
                    self.under_way[n]["return"] += config.gamma ** rollout.time[t, n] * rollout.reward[t, n]
                    if rollout.terminated[t, n] or rollout.truncated[t, n]:
                        done = self.under_way.pop(n)
                        self.returns[done["candidate"]].append(done["return"])
        self.fitness = None
        if all(len(of_candidate) == config.episodes for of_candidate in self.returns):
            self.fitness = np.array([np.mean(of_candidate) for of_candidate in self.returns])
            best = sorted(range(config.population), key=lambda number: -self.fitness[number])
            self.elites = best[: round(config.elite_fraction * config.population)]
            kept = self.candidates[self.elites]
            noise = max(0.0, config.extra_noise * (1 - self.generation / config.noise_generations))
            self.before = self.mean, self.std
            self.mean, self.std = kept.mean(axis=0), np.sqrt(kept.var(axis=0) + noise)
            self.candidates = self.mean + self.std * noise_of(self.candidates)
            self.generation += 1
            self.under_way = {}
            self.begin_generation()
        self.queue = sorted(range(config.population), key=lambda number: (self.begun[number], number))

    def agrees_with(self, state, metrics):
        close = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)  # random numbers and the noise are of 32 bits
        close(vector_of(state.acting.actor)[0], self.mean)
        close(state.acting.candidates, self.candidates)
        close(state.std, self.std)
        assert state.generation == metrics["generation"] == self.generation
        np.testing.assert_array_equal(state.acting.queue, self.queue)
        np.testing.assert_array_equal(state.trial.begun, self.begun)
        close(metrics["parameter_std"], np.mean(self.std))
        if self.fitness is None:
            assert np.isnan([metrics[name] for name in ("search_kl", "population_return", "elite_return")]).all()
            return
        (old_mean, old_std), mean, std = self.before, self.mean, self.std
        kl = np.log(std / old_std) + (old_std**2 + (old_mean - mean) ** 2) / (2 * std**2) - 0.5
        close(metrics["search_kl"], kl.sum())
        close(metrics["population_return"], self.fitness.mean())
        close(metrics["elite_return"], self.fitness[self.elites].mean())


@pytest.mark.parametrize("num_rows", [3, 8, 20])
@pytest.mark.parametrize("episodes", [1, 2])
def test_generations_by_definition_however_batches_cut_the_episodes(num_rows, episodes):
    config = Small(episodes=episodes, num_steps=num_rows, extra_noise=0.2, noise_generations=2)
    state = first_state(config)
    reference = Reference(config, state)
    stream = experience(SPEC, (3, 1, 5, 2, 4, 1, 9, 1, 1, 2, 3, 4, 2, 1, 6, 2, 3, 1, 2, 2) * 6, seed=num_rows)
    stream = stream._replace(valid=np.random.default_rng(0).random(stream.valid.shape) < 0.95)  # what is not valid counts for nothing
    for begin in range(0, len(stream.time) - num_rows, num_rows):
        rollout = part(stream, begin, begin + num_rows)
        state, metrics = update(config, state, rollout)
        reference.learn(rollout)
        reference.agrees_with(state, metrics)
        if reference.generation == 4:
            break
    assert reference.generation >= 3  # the noise has come to its end, and candidates have waited over several batches


def test_rows_of_a_reset_do_not_matter():
    config, rollout = Small(population=2, elite_fraction=0.5), experience(SPEC, (3, 1), seed=5)
    plain, with_rows = (update(config, first_state(config), batches_of(stream, 8)[0]) for stream in (rollout, with_reset_rows(rollout)))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), with_rows, plain)
    assert plain[0].generation == 1


def test_an_episode_that_its_environment_forgot_is_played_again():
    """As after a resume of an environment that cannot continue where it was: nothing waits for its end."""
    config = Small(population=2, elite_fraction=0.5)
    state, metrics = update(config, first_state(config), experience(SPEC, (), unfinished=8))
    np.testing.assert_array_equal(state.trial.begun, 1)
    assert metrics["generation"] == 0
    again, metrics = update(config, state, experience(SPEC, (5, 3), seed=9))
    assert metrics["generation"] == 1
    fresh, _ = update(config, first_state(config), experience(SPEC, (5, 3), seed=9))
    np.testing.assert_allclose(again.acting.candidates, fresh.acting.candidates, rtol=1e-9, atol=1e-9)


# Acting


def actions_of(config, acting, number, obs, spec=SPEC, mask=None):
    """What a candidate does, or the mean for None, by its parameters alone."""
    _, actor_of = vector_of(acting.actor)
    actor = acting.actor if number is None else actor_of(acting.candidates[number])
    x = np.asarray(normalise(acting.normaliser, obs))
    output = np.asarray(actor.head.weight) @ x + np.asarray(actor.head.bias)
    if spec is CONTINUOUS:
        return output
    return np.argmax(output if mask is None else np.where(mask, output, MASKED_LOGIT))


@pytest.mark.parametrize("spec", [SPEC, CONTINUOUS], ids=["discrete", "continuous"])
def test_streams_play_their_candidates_and_without_a_key_the_mean(spec):
    config = Small()
    acting = first_state(config, spec).acting._replace(queue=jnp.asarray([3, 0, 4, 1, 2], jnp.int32))
    obs = np.random.default_rng(0).normal(size=(7, 3))
    carry = jnp.asarray([0, 2, 0, 5, 0, 0, 0], jnp.int32)  # two streams are within an episode
    action, after = cem.act(config, acting, obs, None, carry, KEY)
    expected = [3, 1, 4, 4, 2, 3, 0]
    np.testing.assert_array_equal(after, np.add(expected, 1))
    np.testing.assert_allclose(action, [actions_of(config, acting, *pair, spec) for pair in zip(expected, obs, strict=True)], rtol=1e-5)
    other_key, _ = cem.act(config, acting, obs, None, carry, jax.random.key(99))
    np.testing.assert_array_equal(other_key, action)
    fewer, _ = cem.act(config, acting, obs[:3], None, None, KEY)
    np.testing.assert_allclose(
        fewer, [actions_of(config, acting, number, x, spec) for number, x in zip([3, 0, 4], obs, strict=False)], rtol=1e-5
    )
    mean, unchanged = cem.act(config, acting, obs, None, carry, None)
    np.testing.assert_allclose(mean, [actions_of(config, acting, None, x, spec) for x in obs], rtol=1e-5)
    np.testing.assert_array_equal(unchanged, carry)
    assert cem.act(config, acting, obs, None, None, None)[1] is None
    assert np.any(np.asarray(mean) != np.asarray(action))


def test_forbidden_actions_are_not_taken():
    config = Small()
    acting = first_state(config).acting
    obs = np.random.default_rng(0).normal(size=(5, 3))
    free, _ = cem.act(config, acting, obs, None, None, KEY)
    mask = np.arange(3) != np.asarray(free)[:, None]
    action, _ = cem.act(config, acting, obs, mask, None, KEY)
    np.testing.assert_array_equal(action, [actions_of(config, acting, n, obs[n], mask=mask[n]) for n in range(5)])
    assert np.all(np.asarray(action) != np.asarray(free))


class Counter:
    """Observes the time and a number of its own; an episode is over after as many steps as the number says."""

    name = "Counter"
    observation_space = FLOATS
    action_space = CONTINUOUS.action_space
    max_episode_steps = 100

    def reset(self, key):
        length = jax.random.randint(key, (), 1, 7)
        return (jnp.zeros((), jnp.int32), length), self.observe(0, length)

    def observe(self, time, length):
        return jnp.stack([time / 7, length / 7, 1.0])

    def step(self, state, action):
        time, length = state[0] + 1, state[1]
        return (time, length), self.observe(time, length), action[0], time >= length


def test_what_is_counted_as_a_candidate_s_episode_was_played_by_it():
    """Rewards are actions, which name the candidate: the mean of candidate k acts with k, whatever it sees."""
    config = CEM(population=6, num_steps=5, elite_fraction=0.5, normalise_observation=False)
    environment, spec = Counter(), EnvironmentSpec("counter", FLOATS, CONTINUOUS.action_space, 3)
    state = cem.init(config, spec, jax.random.key(0))
    flat, actor_of = vector_of(state.acting.actor)
    head = actor_of(jnp.arange(flat.size)).head  # where the bias of the first action lies in the vector
    candidates = jnp.zeros((6, flat.size)).at[:, int(head.bias[0])].set(jnp.arange(6) / 10)
    state = state._replace(acting=state.acting._replace(candidates=candidates))
    stream = start_stream(environment, 3, jax.random.key(1), partial(cem.act, config, state.acting))

    @jax.jit
    def iteration(state, stream, key):
        stream, rollout = scan_rollout(environment, partial(cem.act, config, state.acting), stream, 5, 0.0, key)
        return cem.follow(config, state.acting, state.trial, rollout), stream

    for index in range(12):
        trial, stream = iteration(state, stream, jax.random.fold_in(KEY, index))
        queue = jnp.argsort(trial.begun, stable=True).astype(jnp.int32)
        state = state._replace(trial=trial, acting=state.acting._replace(queue=queue))
        if np.all(trial.finished == 1):
            break
    returns = np.asarray(trial.total_return)
    steps = returns[1:] / (np.arange(1, 6) / 10)
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-6)  # every step of the episode was the candidate's own
    assert np.all((steps >= 1) & (steps <= 6))
    assert index > 1  # and batches cut episodes


# Statistics, settings, files


def test_candidates_of_one_generation_see_by_the_same_statistics():
    config = Small(population=3, elite_fraction=0.4)
    state, rollout = first_state(config), experience(SPEC, (5, 3))
    seen = np.concatenate([rollout.obs.reshape(-1, 3)])
    waiting, metrics = update(config, state, rollout)
    assert metrics["generation"] == 0
    jax.tree.map(np.testing.assert_array_equal, waiting.acting.normaliser, state.acting.normaliser)
    np.testing.assert_allclose(waiting.normaliser.mean, seen.mean(axis=0), rtol=1e-5)
    other = experience(SPEC, (5, 3), seed=4)
    over, metrics = update(config, waiting, other)
    assert metrics["generation"] == 1
    seen = np.concatenate([seen, other.obs.reshape(-1, 3)])
    np.testing.assert_allclose(over.acting.normaliser.mean, seen.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(over.acting.normaliser.variance, seen.var(axis=0), rtol=1e-5)
    without = first_state(Small(normalise_observation=False))
    assert without.acting.normaliser is without.normaliser is None


def test_the_first_generation_is_drawn_around_the_network_s_first_parameters():
    config = CEM(population=4000, initial_std=0.3)
    state = first_state(config, CONTINUOUS)
    mean, _ = vector_of(state.acting.actor)
    assert mean.shape == (3 * 2 + 2,)  # the spread of actions, which no candidate draws, is not searched
    assert state.acting.actor.log_std is not None
    spread = np.asarray(state.acting.candidates - mean)
    np.testing.assert_allclose(spread.mean(axis=0), 0.0, atol=0.03)
    np.testing.assert_allclose(spread.std(axis=0), 0.3, rtol=0.05)
    np.testing.assert_allclose(state.std, 0.3)


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("gamma", (0.0, 1.0), (-0.01, 1.01)),
        ("population", (2,), (1,)),
        ("elite_fraction", (1e-9, 1.0), (0.0, 1.01)),
        ("episodes", (1,), (0,)),
        ("initial_std", (1e-9,), (0.0, np.inf)),
        ("extra_noise", (0.0, 5.0), (-0.01, np.inf)),
        ("noise_generations", (1,), (0,)),
        ("num_steps", (1,), (0,)),
    ],
)
def test_bounds(name, inside, outside):
    for value in inside:
        CEM(**{name: value})
    for value in outside:
        with pytest.raises(ValueError, match=rf"^CEM\.{name} must lie in"):
            CEM(**{name: value})


def test_more_environments_than_candidates_are_refused():
    with pytest.raises(ValueError, match="population=2 is less than the 3 environments"):
        cem.init(CEM(population=2), EnvironmentSpec("many", FLOATS, Discrete(3), 3), KEY)
    cem.init(CEM(population=3), EnvironmentSpec("many", FLOATS, Discrete(3), 3), KEY)


@pytest.mark.parametrize("env", ["CartPole-v1", Walk], ids=["device", "host"])
def test_a_run_that_stops_in_the_middle_of_a_generation_goes_on_with_the_same_bits(env, tmp_path):
    with jax.enable_x64(False):
        options = {"steps": 1600, "num_envs": 4, "seed": 0}
        config = CEM(population=8, num_steps=20, hidden=(4,))
        whole = sf.train(config, env, out=tmp_path / "whole", progress=False, **options)
        for report in sf.iterate(config, env, out=tmp_path / "cut", **options):
            if report.step >= 560:
                break
        resumed = sf.resume(tmp_path / "cut", env, progress=False)
        assert bits(resumed.path) == bits(whole.path)
        row = metrics(whole.path)[-1]
        assert row["generation"] >= 1
        assert row["search_kl"] is None or row["search_kl"] > 0
