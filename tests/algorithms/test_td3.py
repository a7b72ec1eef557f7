"""TD3: whole runs against a learner in NumPy: the smaller of two critics, clipped smoothing, and an actor that waits."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import Adam
from test_ddpg import SPEC, A, Linear, N, batch_of, flat, some_steps

from surefoot.algorithms import td3
from surefoot.algorithms.td3 import TD3
from surefoot.replay import Transitions, draw_uniform, insert

Small = partial(TD3, hidden=(), replay_size=200, learning_starts=N + 1, gamma=0.9, minibatch_size=6, update_to_data=3 / N)
update = jax.jit(lambda config, state, rollout, key: td3.update(config, state, rollout, None, key), static_argnums=0)
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.mark.parametrize("settings", [{}, {"policy_delay": 1}, {"target_noise": 1.0, "target_noise_clip": 0.3}], ids=str)
def test_a_run_is_that_of_a_learner_in_numpy(settings):
    """3 steps of the critics follow on each 5 transitions, and of the actor and the targets after every second one, counted through."""
    config = Small(actor_learning_rate=0.02, critic_learning_rate=0.05, target_rate=0.1, **settings)
    state = jax.jit(partial(td3.init, config, SPEC))(jax.random.key(0))
    linear = Linear(state.critics[0])
    actor, critics = flat(state.acting.actor), flat(state.critics).reshape(2, -1)
    assert np.any(critics[0] != critics[1])
    target_actor, target_critics, of_actor, of_critics, count = actor, critics, Adam(), Adam(), 0
    for index in range(4):
        key, rollout = jax.random.fold_in(jax.random.key(5), index), some_steps(index)
        filled = insert(state.replay, rollout)
        before, (state, metrics) = state, update(config, state, rollout, key)
        assert bool(state.acting.is_random) == (index == 0)
        if index == 0:
            for old, new in zip(jax.tree.leaves(before._replace(replay=None)), jax.tree.leaves(state._replace(replay=None)), strict=True):
                np.testing.assert_array_equal(old, new)
            continue
        draw_key, step_key = jax.random.split(key)
        losses, reported = [], []
        for rows, noise_key in zip(draw_uniform(filled, draw_key, (3, 6)), jax.random.split(step_key, 3), strict=True):
            obs, action, reward, terminated, following = batch_of(filled, rows)
            noise = np.asarray(config.target_noise * jax.random.normal(noise_key, (6, A)), np.float64)
            noise = np.clip(noise, -config.target_noise_clip, config.target_noise_clip)
            next_action = np.clip(linear.act(target_actor, following) + noise, -1, 1)
            smaller = np.minimum(*(linear.value(critic, following, next_action) for critic in target_critics))
            target = reward + 0.9 * ~terminated * smaller
            losses.append(sum(np.mean((linear.value(critic, obs, action) - target) ** 2) / 2 for critic in critics))
            gradient = np.concatenate([linear.critic_gradient(critic, obs, action, target) for critic in critics])
            critics = critics - 0.05 * of_critics(gradient).reshape(2, -1)
            count += 1
            if count % config.policy_delay == 0:
                reported.append(-np.mean(linear.value(critics[0], obs, linear.act(actor, obs))))
                actor = actor - 0.02 * of_actor(linear.actor_gradient(actor, critics[0], obs))
                target_actor, target_critics = 0.9 * target_actor + 0.1 * actor, 0.9 * target_critics + 0.1 * critics
        np.testing.assert_allclose(flat(state.critics), critics.ravel(), **CLOSE)
        np.testing.assert_allclose(flat(state.acting.actor), actor, **CLOSE)
        np.testing.assert_allclose(flat(state.target_actor), target_actor, **CLOSE)
        np.testing.assert_allclose(flat(state.target_critics), target_critics.ravel(), **CLOSE)
        np.testing.assert_allclose(metrics["critic_loss"], np.mean(losses), **CLOSE)
        np.testing.assert_allclose(metrics["actor_loss"], np.mean(reported), err_msg="of the steps that the actor took", **CLOSE)
        assert state.num_updates == count


def test_the_smoothing_noise_is_clipped_and_the_target_is_the_smaller_value():
    """With one critic that pays for the action and one that is worth nothing, the target shows what was smoothed."""
    config = Small(target_noise=10.0, target_noise_clip=0.25)
    state = td3.init(config, SPEC, jax.random.key(0))
    linear = Linear(state.critics[0])
    still = jax.tree.map(jnp.zeros_like, state.target_actor)
    wealthy, poor = (jax.tree.map(lambda x, value=value: jnp.full_like(x, value), state.critics[0]) for value in (0.0, 0.0))
    weight = np.zeros((1, wealthy.head.weight.shape[1]), np.float32)
    weight[0, linear.columns[0]] = 1.0
    wealthy = eqx.tree_at(lambda critic: critic.head.weight, wealthy, jnp.asarray(weight))
    batch = Transitions(jnp.zeros(500, jnp.int32), jnp.zeros((500, A)), jnp.full(500, 2.0), jnp.zeros(500, jnp.int32), jnp.full(500, 0.5))
    target = np.asarray(td3.target_of(config, still, (wealthy, poor), batch, jax.random.key(0)))
    assert set(np.round(np.unique(target), 3)) >= {2.0 - 0.125, 2.0}, "the ends of the noise, times the discount; at most nothing"
    assert target.min() == pytest.approx(1.875)
    assert target.max() == pytest.approx(2.0)
    above = np.asarray(td3.target_of(config, still, (wealthy, wealthy), batch, jax.random.key(0)))
    assert above.max() == pytest.approx(2.125)
