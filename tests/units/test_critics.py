"""Fitting a critic: the gradient steps it takes, what it does not look at, and where it arrives."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from surefoot.critics import ValueTargets, critic_optimiser, fit_critic
from surefoot.policies import Critic

pytestmark = pytest.mark.usefixtures("x64")


class Settings:
    critic_epochs, minibatch_size, critic_learning_rate = 3, 12, 0.05


class Linear(eqx.Module):
    weight: jax.Array

    def __call__(self, obs, features):
        return jnp.dot(self.weight, obs)


def targets(noise=0.0):
    """Rows [4, 3] of a linear function, the first four rows not valid and far from it."""
    rng = np.random.default_rng(0)
    obs, valid = rng.normal(size=(4, 3, 2)), np.arange(12).reshape(4, 3) >= 4
    value_target = np.where(valid, obs @ [1.0, -2.0] + noise * rng.normal(size=(4, 3)), 1e6)
    return ValueTargets(jnp.asarray(obs), None, jnp.asarray(value_target), jnp.asarray(valid))


def fit(settings, batch, critic=None, seed=0):
    critic = Linear(jnp.asarray([0.5, 0.5])) if critic is None else critic
    optimiser = critic_optimiser(settings, critic)
    return jax.jit(lambda batch: fit_critic(settings, critic, optimiser, batch, jax.random.key(seed)))(batch)


def test_steps_of_adam_on_half_the_mean_squared_error_of_the_valid_rows():
    batch = targets(noise=0.5)
    critic, optimiser, metrics = fit(Settings, batch)
    obs, target = np.asarray(batch.obs)[batch.valid], np.asarray(batch.value_target)[batch.valid]
    weight, moments, losses = jnp.asarray([0.5, 0.5]), optax.adam(0.05).init(jnp.zeros(2)), []
    for _ in range(3):
        error = obs @ np.asarray(weight) - target
        change, moments = optax.adam(0.05).update(jnp.asarray(obs.T @ error / len(error)), moments)
        losses.append(np.mean(error**2) / 2)
        weight = weight + change
    np.testing.assert_allclose(critic.weight, weight, rtol=1e-12)
    np.testing.assert_allclose(metrics["value_loss"], losses[-1], rtol=1e-12)
    assert set(metrics) == {"value_loss"}
    assert optimiser[0].count == 3


def test_it_takes_a_step_for_every_minibatch_of_every_epoch_and_arrives():
    class Longer(Settings):
        critic_epochs, minibatch_size = 200, 3

    critic, optimiser, metrics = fit(Longer, targets())
    assert optimiser[0].count == 200 * 4
    np.testing.assert_allclose(critic.weight, [1.0, -2.0], atol=1e-3)
    assert metrics["value_loss"] < 1e-6


def test_the_order_follows_from_the_key():
    class Minibatches(Settings):
        minibatch_size = 4

    first, again, other = (fit(Minibatches, targets(), seed=seed)[0].weight for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


def test_a_critic_of_the_package_is_fitted_as_it_is():
    from gymnasium.spaces import Box

    critic = Critic("mlp", Box(-1.0, 1.0, (2,)), jax.random.key(0), hidden=(4,), activation="tanh")
    fitted, _, metrics = fit(Settings, targets(), critic)
    assert jax.tree.structure(fitted) == jax.tree.structure(critic)
    assert np.isfinite(metrics["value_loss"])
    assert np.any(fitted.head.weight != critic.head.weight)
