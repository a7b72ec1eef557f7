"""SAC: the soft value as a sum, a sample and an integral; whole runs against a learner in NumPy; the temperature; where it ends."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import ENDS, FOLLOWING, PAID, Adam, best_values, every_pair, unconnected
from gymnasium.spaces import Box, Discrete
from jax.flatten_util import ravel_pytree

from surefoot.algorithms import sac
from surefoot.algorithms.sac import SAC, Acting, SoftActor, soft_value, wanted_entropy
from surefoot.distributions import TanhGaussian
from surefoot.pathwise import ActionCritic
from surefoot.replay import draw_uniform, insert
from surefoot.types import EnvironmentSpec

S, A, N = 4, 3, 5
CHOICES = EnvironmentSpec("choices", Discrete(S), Discrete(A), N)
ARM = EnvironmentSpec("arm", Box(-1.0, 1.0, (2,)), Box(-1.0, 1.0, (1,)), N)
Small = partial(SAC, hidden=(), replay_size=200, learning_starts=N + 1, gamma=0.9, minibatch_size=6, update_to_data=3 / N)
update = jax.jit(lambda config, state, rollout, key: sac.update(config, state, rollout, None, key), static_argnums=0)


def parts(spec, seed=0, **shape):
    """(an actor that prefers something, two critics)"""
    config = Small(**shape)
    keys = jax.random.split(jax.random.key(seed), 4)
    actor = jax.tree.map(lambda x: x + 0.5 * jax.random.normal(keys[3], x.shape), SoftActor(config, spec, keys[0]))
    return actor, tuple(ActionCritic(config, spec, key) for key in keys[1:3])


def softmax(x):
    p = np.exp(x - x.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


# The soft value


@pytest.mark.parametrize("masked", [False, True], ids=["every action", "masked"])
def test_with_choices_it_is_the_mean_over_sampled_actions(masked):
    actor, critics = parts(CHOICES)
    obs = jnp.arange(S)
    mask = np.array([[1, 1, 0], [1, 1, 1], [0, 1, 1], [0, 1, 0]], bool) if masked else np.ones((S, A), bool)
    value, entropy = soft_value(actor, critics, obs, mask if masked else None, 0.3, None)
    logits = np.where(mask, jax.vmap(lambda obs: actor.head(actor.features(obs)))(obs), -np.inf)
    q = np.minimum(*(np.asarray(jax.vmap(critic)(obs), np.float64) for critic in critics))
    p = softmax(logits.astype(np.float64))
    log_p = np.log(np.where(p > 0, p, 1))
    np.testing.assert_allclose(value, np.sum(p * (q - 0.3 * log_p), axis=1), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(entropy, -np.sum(p * log_p, axis=1), rtol=2e-5, atol=1e-6)
    distribution, num = jax.vmap(actor)(obs, mask), 20_000
    action = jax.vmap(distribution.sample)(jax.random.split(jax.random.key(1), num))
    log_prob = np.asarray(jax.vmap(distribution.log_prob)(action))
    samples = q[np.arange(S), np.asarray(action)] - 0.3 * log_prob
    assert mask[np.arange(S), np.asarray(action)].all()
    assert np.all(np.abs(samples.mean(axis=0) - value) <= 5 * samples.std(axis=0) / np.sqrt(num) + 1e-5)


def test_with_a_number_it_is_an_integral_of_which_each_sample_is_an_estimate():
    actor, critics = parts(ARM, hidden=(8,))
    obs = jnp.asarray([[0.5, -0.3], [-1.0, 0.9]])
    distribution: TanhGaussian = jax.vmap(actor)(obs, None)
    z, weight = np.polynomial.hermite_e.hermegauss(100)
    for row in range(2):
        mean, std = float(distribution.mean[row, 0]), float(np.exp(distribution.log_std[row, 0]))
        u = mean + std * z
        q = np.minimum(*(np.asarray(jax.vmap(critic, (None, 0))(obs[row], jnp.tanh(jnp.asarray(u))[:, None])) for critic in critics))
        log_prob = -0.5 * z**2 - 0.5 * np.log(2 * np.pi) - np.log(std) - 2 * (np.log(2) - u - np.logaddexp(0, -2 * u))
        integral = np.sum(weight * (q - 0.3 * log_prob)) / np.sqrt(2 * np.pi)
        of_entropy = np.sum(weight * -log_prob) / np.sqrt(2 * np.pi)
        keys = jax.random.split(jax.random.key(row), 40_000)
        drawn, entropy = jax.vmap(lambda key, row=row: soft_value(actor, critics, obs[row : row + 1], None, 0.3, key))(keys)
        for samples, expected in ((np.asarray(drawn), integral), (np.asarray(entropy), of_entropy)):
            assert abs(samples.mean() - expected) < 5 * samples.std() / np.sqrt(samples.size)


def test_the_actors_gradient_goes_through_the_sample():
    """Of the mean of many samples it is the gradient of the integral, by differences."""
    actor, critics = parts(ARM, hidden=())
    obs = jnp.asarray([[0.5, -0.3]])
    flat, unravel = ravel_pytree(actor)
    keys = jax.random.split(jax.random.key(0), 4000)

    @jax.jit
    def mean_value(flat):
        return jnp.mean(jax.vmap(lambda key: soft_value(unravel(flat), critics, obs, None, 0.3, key)[0])(keys))

    gradient, step = np.asarray(jax.grad(mean_value)(flat)), 1e-2
    differences = [(mean_value(flat.at[i].add(step)) - mean_value(flat.at[i].add(-step))) / (2 * step) for i in range(len(flat))]
    np.testing.assert_allclose(gradient, differences, rtol=0.02, atol=2e-3)


# Whole runs against a learner in NumPy


def some_steps(seed, masked):
    rng = np.random.default_rng(seed)
    obs, following = rng.integers(S, size=(2, 1, N)).astype(np.int32)
    masks = np.array([[1, 1, 0], [1, 1, 1], [0, 1, 1], [0, 1, 0]], bool)
    action = rng.integers(A, size=(1, N)).astype(np.int32)
    action = np.where(masks[obs, action] | (not masked), action, 1).astype(np.int32)
    own = {"mask": masks[obs], "next_mask": masks[following]} if masked else {}
    return unconnected(obs, action, rng.normal(size=(1, N)), rng.random((1, N)) < 0.3, following, **own)


def table(flat):
    """[S, A] of a linear layer's weights and biases."""
    return (flat[: A * S].reshape(A, S) + flat[A * S :, None]).T


def as_vector(of_table):
    """The gradient of weights and biases by that of the table."""
    return np.concatenate([of_table.T.ravel(), of_table.sum(axis=0)])


@pytest.mark.parametrize(
    ("settings", "masked"),
    [({}, False), ({}, True), ({"temperature": 0.2}, False), ({"target_entropy": 0.4, "temperature_learning_rate": 0.1}, False)],
    ids=["plain", "masked", "fixed temperature", "own target"],
)
def test_a_run_is_that_of_a_learner_in_numpy(settings, masked):
    """Nothing is learned from the first 5 transitions; from then on 3 steps of critics, actor and temperature follow on each 5."""
    config = Small(actor_learning_rate=0.02, critic_learning_rate=0.05, target_rate=0.1, **settings)
    spec = EnvironmentSpec("choices", Discrete(S), Discrete(A), N, has_action_mask=masked)
    state = jax.jit(partial(sac.init, config, spec))(jax.random.key(0))
    flat = partial(lambda tree: np.array(ravel_pytree(tree)[0], np.float64))
    actor, critics = flat(state.acting.actor), flat(state.critics).reshape(2, -1)
    targets, log_temperature = critics, float(state.log_temperature)
    of_actor, of_critics, of_temperature = Adam(), Adam(), Adam(eps=1e-8)

    def policy(obs, legal):
        p = softmax(np.where(legal, table(actor)[obs], -np.inf))
        return p, np.log(np.where(p > 0, p, 1))

    for index in range(4):
        key, rollout = jax.random.fold_in(jax.random.key(5), index), some_steps(index, masked)
        filled = insert(state.replay, rollout)
        before, (state, metrics) = state, update(config, state, rollout, key)
        assert bool(state.acting.is_random) == (index == 0)
        if index == 0:
            for old, new in zip(jax.tree.leaves(before._replace(replay=None)), jax.tree.leaves(state._replace(replay=None)), strict=True):
                np.testing.assert_array_equal(old, new)
            continue
        temperatures, entropies = [], []
        for rows in np.asarray(draw_uniform(filled, jax.random.split(key)[0], (3, 6))):
            ring, stored = len(filled.order) // N, jax.tree.map(np.asarray, filled.rows)
            after = rows // ring * ring + (rows % ring + 1) % ring
            obs, following = stored.obs[rows], stored.obs[after]
            legal, next_legal = (np.ones((6, A), bool) if not masked else stored.action_mask[place] for place in (rows, after))
            temperature = np.exp(log_temperature)
            temperatures.append(temperature)
            p, log_p = policy(following, next_legal)
            soft = np.sum(p * (np.minimum(*(table(one)[following] for one in targets)) - temperature * log_p), axis=1)
            target = stored.reward[rows] + 0.9 * ~stored.terminated[rows] * soft
            gradient = np.zeros((2, S, A))
            for i, critic in enumerate(critics):
                for o, a, y in zip(obs, stored.action[rows], target, strict=True):
                    gradient[i, o, a] += (table(critic)[o, a] - y) / 6
            critics = critics - 0.05 * of_critics(np.concatenate([*map(as_vector, gradient)])).reshape(2, -1)
            p, log_p = policy(obs, legal)
            worth = np.minimum(*(table(one)[obs] for one in critics)) - temperature * log_p
            of_logits = np.zeros((S, A))
            for o, row in zip(obs, -p * (worth - np.sum(p * worth, axis=1, keepdims=True)) / 6, strict=True):
                of_logits[o] += row
            entropy = np.mean(-np.sum(p * log_p, axis=1))
            entropies.append(entropy)
            actor = actor - 0.02 * of_actor(as_vector(of_logits))
            if config.temperature is None:
                wanted = np.mean(0.98 * np.log(legal.sum(axis=1))) if config.target_entropy is None else config.target_entropy
                log_temperature -= config.temperature_learning_rate * of_temperature(entropy - wanted)
            targets = 0.9 * targets + 0.1 * critics
        close = partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)
        close(flat(state.critics), critics.ravel())
        close(flat(state.acting.actor), actor)
        close(flat(state.target_critics), targets.ravel())
        close(state.log_temperature, log_temperature)
        close(metrics["temperature"], np.mean(temperatures))
        close(metrics["entropy"], np.mean(entropies))


# The temperature


@pytest.mark.parametrize("spec", [CHOICES, ARM], ids=["choices", "a number"])
@pytest.mark.parametrize(("offset", "direction"), [(-0.5, -1), (0.5, 1)], ids=["too much entropy", "too little"])
def test_the_temperature_moves_the_entropy_towards_its_target(spec, offset, direction):
    """Above its target the price falls, below it the price rises; by the same step, however far it is."""
    is_choice = spec is CHOICES
    target = (np.log(A) if is_choice else np.log(2)) + offset  # of the policy in the beginning about the first
    config = Small(target_entropy=target, learning_starts=1, temperature_learning_rate=0.1)
    state = sac.init(config, spec, jax.random.key(0))
    rollout = some_steps(0, False) if is_choice else continuous_steps(0)
    after, _ = update(config, state, rollout, jax.random.key(1))
    assert np.sign(after.log_temperature - state.log_temperature) == direction
    fixed = Small(temperature=0.5, learning_starts=1)
    state = sac.init(fixed, spec, jax.random.key(0))
    after, metrics = update(fixed, state, rollout, jax.random.key(1))
    np.testing.assert_array_equal(after.log_temperature, state.log_temperature)
    np.testing.assert_allclose(metrics["temperature"], 0.5, rtol=1e-6)
    assert np.any(ravel_pytree(after.acting.actor)[0] != ravel_pytree(state.acting.actor)[0])


def continuous_steps(seed):
    rng = np.random.default_rng(seed)
    obs, following = rng.normal(size=(2, 1, N, 2)).astype(np.float32)
    return unconnected(obs, rng.uniform(-1, 1, size=(1, N, 1)).astype(np.float32), rng.normal(size=(1, N)), np.zeros((1, N)), following)


def test_what_the_temperature_aims_at():
    of_choices, of_arm = parts(CHOICES)[0], parts(ARM)[0]
    np.testing.assert_allclose(wanted_entropy(Small(), of_choices, None), 0.98 * np.log(A), rtol=1e-6)
    mask = np.array([[True, True, False], [False, True, False]])
    np.testing.assert_allclose(wanted_entropy(Small(), of_choices, mask), 0.98 * np.log(2) / 2, rtol=1e-6)
    assert wanted_entropy(Small(), of_arm, None) == -1
    assert wanted_entropy(Small(target_entropy=0.3), of_arm, None) == 0.3


# Acting


def test_actions_are_uniform_before_learning_and_the_policys_afterwards():
    actor, _ = parts(CHOICES)
    obs = jnp.zeros(20_000, jnp.int32)
    probs = np.asarray(jnp.exp(actor(jnp.int32(0), None).log_probs))
    assert np.ptp(probs) > 0.1
    for is_random, expected in ((True, np.full(A, 1 / A)), (False, probs)):
        action, _ = sac.act(Small(), Acting(actor, jnp.array(is_random)), obs, None, None, jax.random.key(0))
        counts = np.bincount(action, minlength=A)
        assert np.sum((counts - 20_000 * expected) ** 2 / (20_000 * expected)) < 14  # chi-squared, 2 degrees, one in a thousand above
        best, _ = sac.act(Small(), Acting(actor, jnp.array(is_random)), obs[:3], None, None, None)
        np.testing.assert_array_equal(best, [probs.argmax()] * 3)
        mask = np.array([[True, False, True]]).repeat(20_000, axis=0)
        action, _ = sac.act(Small(), Acting(actor, jnp.array(is_random)), obs, mask, None, jax.random.key(0))
        assert set(np.unique(action)) == {0, 2}


# Where it ends


def test_a_table_ends_at_the_values_of_the_best_policy_when_entropy_is_worth_nothing():
    spec = EnvironmentSpec("pairs", Discrete(4), Discrete(2), 8)
    config = Small(
        **{"temperature": 1e-6, "learning_starts": 1, "update_to_data": 1.0, "minibatch_size": 32},
        **{"critic_learning_rate": 0.02, "actor_learning_rate": 0.1, "target_rate": 0.05},
    )

    @jax.jit
    def run(state):
        def iteration(state, index):
            return sac.update(config, state, every_pair(), None, jax.random.fold_in(jax.random.key(0), index))[0], None

        return jax.lax.scan(iteration, state, jnp.arange(300))[0]

    state = run(sac.init(config, spec, jax.random.key(0)))
    best = best_values(FOLLOWING, PAID, ENDS, 0.9)
    values = np.stack([jax.vmap(critic)(jnp.arange(4)) for critic in state.critics])
    np.testing.assert_allclose(values, [best, best], atol=0.05)
    action, _ = sac.act(config, state.acting, jnp.arange(4), None, None, None)
    np.testing.assert_array_equal(action, best.argmax(axis=1))
