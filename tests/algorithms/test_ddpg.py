"""DDPG: whole runs against a learner in NumPy, and what acts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import Adam, unconnected
from gymnasium.spaces import Box, Discrete
from jax.flatten_util import ravel_pytree

from surefoot.algorithms import ddpg
from surefoot.algorithms.ddpg import DDPG
from surefoot.pathwise import DeterministicActing, DeterministicActor
from surefoot.replay import draw_uniform, insert
from surefoot.types import EnvironmentSpec

S, A, N = 4, 2, 5
SPEC = EnvironmentSpec("arm", Discrete(S), Box(-1.0, 1.0, (A,)), N)
Small = partial(DDPG, hidden=(), replay_size=200, learning_starts=N + 1, gamma=0.9, minibatch_size=6, update_to_data=3 / N)
update = jax.jit(lambda config, state, rollout, key: ddpg.update(config, state, rollout, None, key), static_argnums=0)


def some_steps(seed):
    rng = np.random.default_rng(seed)
    state, following = rng.integers(S, size=(2, 1, N)).astype(np.int32)
    action = rng.uniform(-1, 1, size=(1, N, A)).astype(np.float32)
    return unconnected(state, action, rng.normal(size=(1, N)), rng.random((1, N)) < 0.3, following)


class Linear:
    """An actor tanh(W s) and a critic w.(s, a) + b in NumPy, s being one-hot; parameters as the vectors that the learner moves."""

    def __init__(self, critic):
        obs, zero, one = jnp.zeros((), jnp.int32), jnp.zeros(A), jnp.eye(A)
        features = np.asarray(jax.vmap(critic.features, (None, 0))(obs, one) - critic.features(obs, zero)).astype(int)
        self.columns = features.argmax(axis=-1)  # where in the features an action's numbers stand

    def features(self, state, action):
        x = np.zeros((len(state), S + A + 1))
        x[:, self.columns] = action
        others = [column for column in range(S + A) if column not in self.columns]
        x[np.arange(len(state)), np.array(others)[state]] = 1
        x[:, -1] = 1  # the bias
        return x

    def value(self, critic, state, action):
        return self.features(state, action) @ critic

    def act(self, actor, state):
        return np.tanh(actor[: A * S].reshape(A, S)[:, state].T + actor[A * S :])

    def critic_gradient(self, critic, state, action, target):
        return (self.value(critic, state, action) - target) @ self.features(state, action) / len(state)

    def actor_gradient(self, actor, critic, state):
        """Down minus the critic's value."""
        of_output = -critic[self.columns] * (1 - self.act(actor, state) ** 2) / len(state)  # [B, A]
        of_weight = np.zeros((A, S))
        for s, row in zip(state, of_output, strict=True):
            of_weight[:, s] += row
        return np.concatenate([of_weight.ravel(), of_output.sum(axis=0)])


def batch_of(filled, rows):
    """(state, action, reward, terminated, next state) of stored rows; the next state stands in the row after."""
    ring = len(filled.order) // N
    after = rows // ring * ring + (rows % ring + 1) % ring
    stored = filled.rows
    return tuple(
        np.asarray(x) for x in (stored.obs[rows], stored.action[rows], stored.reward[rows], stored.terminated[rows], stored.obs[after])
    )


def flat(tree):
    return np.array(ravel_pytree(tree)[0], np.float64)


@pytest.mark.parametrize("max_grad_norm", [np.inf, 0.05])
def test_a_run_is_that_of_a_learner_in_numpy(max_grad_norm):
    """Nothing is learned from the first 5 transitions; from then on 3 steps of critic and actor follow on each 5."""
    config = Small(actor_learning_rate=0.02, critic_learning_rate=0.05, target_rate=0.1, max_grad_norm=max_grad_norm)
    state = jax.jit(partial(ddpg.init, config, SPEC))(jax.random.key(0))
    linear = Linear(state.critic)
    actor, critic = flat(state.acting.actor), flat(state.critic)
    target_actor, target_critic, of_actor, of_critic = actor, critic, Adam(), Adam()

    def clipped(gradient):
        return gradient * min(1.0, max_grad_norm / np.linalg.norm(gradient))

    for index in range(4):
        key, rollout = jax.random.fold_in(jax.random.key(5), index), some_steps(index)
        filled = insert(state.replay, rollout)
        before, (state, metrics) = state, update(config, state, rollout, key)
        assert bool(state.acting.is_random) == (index == 0)
        if index == 0:
            for old, new in zip(jax.tree.leaves(before._replace(replay=None)), jax.tree.leaves(state._replace(replay=None)), strict=True):
                np.testing.assert_array_equal(old, new)
            continue
        losses = []
        for rows in draw_uniform(filled, jax.random.split(key)[0], (3, 6)):
            obs, action, reward, terminated, following = batch_of(filled, rows)
            target = reward + 0.9 * ~terminated * linear.value(target_critic, following, linear.act(target_actor, following))
            losses.append(np.mean((linear.value(critic, obs, action) - target) ** 2) / 2)
            critic = critic - 0.05 * of_critic(clipped(linear.critic_gradient(critic, obs, action, target)))
            actor = actor - 0.02 * of_actor(clipped(linear.actor_gradient(actor, critic, obs)))
            target_actor, target_critic = 0.9 * target_actor + 0.1 * actor, 0.9 * target_critic + 0.1 * critic
        close = partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)
        close(flat(state.critic), critic)
        close(flat(state.acting.actor), actor)
        close(flat(state.target_actor), target_actor)
        close(flat(state.target_critic), target_critic)
        close(metrics["critic_loss"], np.mean(losses))


def test_the_action_is_the_actors_with_noise_or_uniform_before_learning():
    config, obs = Small(exploration_noise=0.2), jnp.zeros(20_000, jnp.int32)
    actor = DeterministicActor(config, SPEC, jax.random.key(1))
    actor = jax.tree.map(lambda x: x + (0.3 if x.ndim == 1 else 0.0), actor)
    mean = np.asarray(actor(jnp.int32(0)))
    calm, _ = ddpg.act(config, DeterministicActing(actor, jnp.array(True)), obs[:3], None, None, None)
    np.testing.assert_allclose(calm, [mean] * 3, rtol=1e-6)
    noisy, _ = ddpg.act(config, DeterministicActing(actor, jnp.array(False)), obs, None, None, jax.random.key(0))
    np.testing.assert_allclose(noisy.mean(axis=0), mean, atol=5 * 0.2 / np.sqrt(20_000))
    np.testing.assert_allclose(noisy.std(axis=0), 0.2, rtol=0.04)
    uniform, _ = ddpg.act(config, DeterministicActing(actor, jnp.array(True)), obs, None, None, jax.random.key(0))
    counts = np.stack([np.histogram(column, bins=10, range=(-1, 1))[0] for column in np.asarray(uniform).T])
    assert counts.sum() == 2 * 20_000
    assert np.all(np.sum((counts - 2000) ** 2 / 2000, axis=1) < 33)  # chi-squared with 9 degrees of freedom, one in 5000 above
    loud, _ = ddpg.act(Small(exploration_noise=5.0), DeterministicActing(actor, jnp.array(False)), obs, None, None, jax.random.key(0))
    assert float(jnp.max(jnp.abs(loud))) == 1.0
