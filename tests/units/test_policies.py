"""Actors, critics, acting, memories, and values of true successors."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete

from surefoot.algorithms.ppo import PPO
from surefoot.distributions import Categorical, DiagonalGaussian
from surefoot.estimates import estimate, state_values
from surefoot.normalise import Moments, normalise
from surefoot.policies import (
    Actor,
    Critic,
    StochasticPolicy,
    act,
    actor_and_critic,
    begin_episodes,
    distributions_and_values,
    distributions_of,
    features_of,
    inputs_of,
)
from surefoot.training.presets import with_settings
from surefoot.types import EnvironmentSpec, Rollout

OBSERVATIONS = Box(-9.0, 9.0, (3,))
SHAPE = {"hidden": (8,), "activation": "tanh"}
OBS = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
MOMENTS = Moments(jnp.asarray([1.0, 0.0, -1.0]), jnp.asarray([4.0, 1.0, 0.25]), jnp.asarray(10.0))


def actor_for(action_space, observation_space=OBSERVATIONS):
    return jax.jit(lambda key: Actor("mlp", observation_space, action_space, key, **SHAPE))(jax.random.key(0))


def distribution_of(actor, obs, action_mask=None):
    return actor.choose(actor.torso(obs), action_mask)


def distributions(actor):
    return jax.vmap(functools.partial(distribution_of, actor))(OBS)


def critic_for(observation_space=OBSERVATIONS, seed=0):
    return jax.jit(lambda key: Critic("mlp", observation_space, key, **SHAPE))(jax.random.key(seed))


def test_a_discrete_actor_is_a_linear_head_on_its_torso():
    actor = actor_for(Discrete(4, start=2))
    distribution = distribution_of(actor, OBS[0])
    assert isinstance(distribution, Categorical)
    logits = actor.head.weight @ actor.torso(OBS[0]) + actor.head.bias
    np.testing.assert_allclose(distribution.log_probs, jax.nn.log_softmax(logits), rtol=1e-6)
    assert actor.log_std is None
    mask = jnp.asarray([True, False, True, False])
    np.testing.assert_allclose(distribution_of(actor, OBS[0], mask).log_probs, Categorical.from_logits(logits, mask).log_probs, rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
def test_a_continuous_actor_gives_a_mean_and_a_spread_for_each_number(shape):
    actor = actor_for(Box(-2.0, 5.0, shape))
    size = int(np.prod(shape))
    actor = eqx.tree_at(lambda actor: actor.log_std, actor, jnp.arange(size) / 10)
    distribution = distribution_of(actor, OBS[0])
    assert isinstance(distribution, DiagonalGaussian)
    np.testing.assert_allclose(distribution.mean, actor.head.weight @ actor.torso(OBS[0]), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(distribution.log_std, jnp.arange(size) / 10)


def test_policies_begin_near_uniform_or_near_zero_with_unit_spread():
    """A head of gain 0.01 on features within [-1, 1]: logits and means of at most 0.01 sqrt(8)."""
    probs = np.exp(distributions(actor_for(Discrete(4))).log_probs)
    assert np.abs(probs - 0.25).max() < 0.02
    assert np.ptp(probs) > 1e-5
    gaussian = distributions(actor_for(Box(-1.0, 1.0, (2,))))
    assert 1e-5 < np.abs(gaussian.mean).max() < 0.03
    np.testing.assert_array_equal(gaussian.log_std, 0.0)
    narrower = Actor("mlp", OBSERVATIONS, Box(-1.0, 1.0, (2,)), jax.random.key(0), initial_log_std=-0.5, **SHAPE)
    np.testing.assert_array_equal(distributions(narrower).log_std, -0.5)
    head = critic_for().head
    np.testing.assert_allclose(np.linalg.norm(head.weight), 1.0, rtol=1e-6)


def test_torso_and_head_have_keys_of_their_own():
    actor, critic = actor_for(Discrete(8)), critic_for(seed=1)
    assert np.abs(actor.torso.layers[0].weight - critic.torso.layers[0].weight).max() > 0.1


def test_a_critic_gives_one_number():
    critic = critic_for()
    value = critic(OBS[0], None)
    assert value.shape == ()
    np.testing.assert_allclose(value, (critic.head.weight @ critic.torso(OBS[0]))[0], rtol=1e-6)


def test_a_policy_sees_normalised_observations():
    """Differently scaled features would draw different actions."""
    actor = eqx.tree_at(lambda actor: actor.head.weight, actor_for(Discrete(4)), replace_fn=lambda weight: 300 * weight)
    expected = np.array([distribution_of(actor, normalise(MOMENTS, row)).mode() for row in OBS])
    np.testing.assert_array_equal(act(PPO(), StochasticPolicy(actor, MOMENTS), OBS, None, None, None)[0], expected)
    assert (act(PPO(), StochasticPolicy(actor, None), OBS, None, None, None)[0] != expected).any()


def test_acting_takes_the_mode_or_draws_with_the_key():
    masks = jnp.asarray([[False, True, True, True]] * 5)
    policy = StochasticPolicy(actor_for(Discrete(4)), None)
    distribution = jax.vmap(functools.partial(distribution_of, policy.actor))(OBS, masks)
    action, carry = act(PPO(), policy, OBS, masks, "carry", None)
    np.testing.assert_array_equal(action, distribution.mode())
    assert carry == "carry"
    drawn = [act(PPO(), policy, OBS, masks, None, jax.random.key(seed))[0] for seed in range(8)]
    np.testing.assert_array_equal(drawn[3], distribution.sample(jax.random.key(3)))
    assert all((action > 0).all() for action in drawn)
    assert len({tuple(action.tolist()) for action in drawn}) > 4


# Memory

MEMORY = PPO(memory="gru", memory_size=5, hidden=(8,), num_steps=6, minibatch_size=6, sequence_length=3)
SPEC = EnvironmentSpec("memory", OBSERVATIONS, Discrete(4), 3)


def remembering(config=MEMORY, seed=0):
    """(policy, critic) whose heads are large enough that memories matter."""
    policy, critic = jax.jit(functools.partial(actor_and_critic, config, SPEC))(jax.random.key(seed))
    return jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(jax.random.key(seed + 1), x.shape), (policy._replace(normaliser=MOMENTS), critic)
    )


def rollout_with_ends(num_steps=6, num_envs=3, config=MEMORY):
    """Random rows; episodes end in the middle of the batch, and one began before it."""
    rng = np.random.default_rng(0)
    ends = np.zeros((num_steps, num_envs), bool)
    ends[2, 0] = ends[4, 1] = ends[0, 2] = True
    time = np.zeros((num_steps, num_envs), np.int32)
    time[0] = 3, 0, 2
    for t in range(1, num_steps):
        time[t] = np.where(ends[t - 1], 0, time[t - 1] + 1)
    return Rollout(
        obs=rng.normal(size=(num_steps, num_envs, 3)).astype(np.float32),
        action=rng.integers(4, size=(num_steps, num_envs)),
        reward=rng.normal(size=(num_steps, num_envs)).astype(np.float32),
        terminated=ends & (np.arange(num_envs) == 0),
        truncated=ends & (np.arange(num_envs) != 0),
        final_obs=rng.normal(size=(num_steps, num_envs, 3)).astype(np.float32),
        valid=np.ones((num_steps, num_envs), bool),
        time=time,
        last_obs=rng.normal(size=(num_envs, 3)).astype(np.float32),
        progress=np.float32(0),
        carry=None if config.memory == "none" else rng.normal(size=(num_envs, 5)).astype(np.float32),
    )


def test_learning_unrolls_the_memory_that_acting_had():
    """Episode by episode: cut where one ends, and carried over from before the batch where one goes on."""
    (policy, _), rollout = remembering(), rollout_with_ends()
    unrolled = distributions_of(policy.actor, inputs_of(policy, rollout))
    carry = rollout.carry
    for t, obs in enumerate(rollout.obs):
        carry = begin_episodes(carry, rollout.time[t])
        action, carry = act(MEMORY, policy, obs, None, carry, jax.random.key(t))
        np.testing.assert_array_equal(action, Categorical(unrolled.log_probs[t]).sample(jax.random.key(t)))
        np.testing.assert_allclose(jax.vmap(policy.actor.choose)(carry, None).log_probs, unrolled.log_probs[t], rtol=1e-5, atol=1e-6)
    forgetful = distributions_of(policy.actor, inputs_of(policy, rollout._replace(carry=0 * rollout.carry)))
    differs = np.abs(forgetful.log_probs - unrolled.log_probs).max(axis=-1) > 1e-4
    np.testing.assert_array_equal(differs[0], [True, False, True])
    assert not differs[3:, 0].any()


def test_a_sequence_from_the_middle_of_a_batch_begins_with_the_memory_there():
    (policy, critic), rollout = remembering(), rollout_with_ends()
    before = estimate(MEMORY, policy, critic, None, rollout)
    middle = jax.tree.map(lambda x: x[3:], before.inputs)
    distribution, value = distributions_and_values(policy.actor, critic, middle)
    np.testing.assert_allclose(distribution.log_probs, before.old.log_probs[3:], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(value, before.value[3:], rtol=1e-5)


def test_no_memory_is_an_empty_one():
    policy, _ = remembering()
    empty, kept = act(MEMORY, policy, OBS, None, None, None), act(MEMORY, policy, OBS, None, jnp.zeros((5, 5)), None)
    jax.tree.map(np.testing.assert_array_equal, empty, kept)


@pytest.mark.parametrize("shared_trunk", [False, True])
@pytest.mark.parametrize("memory", ["none", "gru"])
def test_the_value_of_a_successor_is_that_of_one_step_more(memory, shared_trunk):
    config = with_settings(MEMORY, {"memory": memory, "shared_trunk": shared_trunk})
    (policy, critic), rollout = remembering(config), rollout_with_ends(config=config)
    inputs = inputs_of(policy, rollout)
    value, next_value = state_values(policy, critic, rollout, features_of(policy.actor, inputs))
    np.testing.assert_allclose(value, distributions_and_values(policy.actor, critic, inputs)[1], rtol=1e-5)
    longer = rollout._replace(
        obs=np.concatenate([rollout.obs, rollout.last_obs[None]]), time=np.concatenate([rollout.time, rollout.time[-1:] + 1])
    )
    for t in range(6):  # the rows up to t, and then what the episode showed at its end, or what came next
        ended = (rollout.terminated | rollout.truncated)[t]
        seen = np.concatenate([longer.obs[: t + 1], np.where(ended[:, None], rollout.final_obs[t], longer.obs[t + 1])[None]])
        time = np.concatenate([rollout.time[: t + 1], rollout.time[t : t + 1] + 1])
        values = distributions_and_values(policy.actor, critic, inputs_of(policy, rollout._replace(obs=seen, time=time)))[1]
        np.testing.assert_allclose(next_value[t], values[-1], rtol=1e-4)


@pytest.mark.parametrize("shared_trunk", [False, True])
@pytest.mark.parametrize("memory", ["none", "gru"])
def test_only_a_shared_trunk_takes_the_critics_gradient_to_the_actor(memory, shared_trunk):
    config = with_settings(MEMORY, {"memory": memory, "shared_trunk": shared_trunk})
    (policy, critic), rollout = remembering(config), rollout_with_ends(config=config)

    def values(actor, critic):
        return jnp.sum(distributions_and_values(actor, critic, inputs_of(policy, rollout))[1])

    of_actor, of_critic = jax.grad(values, argnums=(0, 1))(policy.actor, critic)
    assert any(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(of_actor)) == shared_trunk
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(of_critic))
    assert (critic.torso is None) == shared_trunk


def test_the_critic_reads_what_the_actor_remembers():
    (policy, critic), rollout = remembering(), rollout_with_ends()
    values = [estimate(MEMORY, policy, critic, None, rollout._replace(carry=scale * rollout.carry)).value for scale in (0, 1)]
    np.testing.assert_array_equal((np.abs(values[0] - values[1]) > 1e-4)[0], [True, False, True])


# Values


def value_of(obs, features):
    """A critic that tells its observations apart."""
    return 10.0 * obs["place"][0] + obs["place"][1]


@pytest.mark.parametrize("normaliser", [None, {"place": Moments(jnp.asarray([1.0, 2.0]), jnp.asarray([4.0, 0.25]), jnp.asarray(1.0))}])
def test_values_of_rows_and_of_their_true_successors(normaliser):
    """The successor of an ended row is its final observation; of another, what was acted on next, the last row's included."""
    rng = np.random.default_rng(0)
    num_steps, num_streams = 6, 3

    def observations(*shape):
        return {"place": rng.normal(size=(*shape, 2)).astype(np.float32)}

    rollout = Rollout(
        obs=observations(num_steps, num_streams),
        action=None,
        reward=None,
        terminated=rng.random((num_steps, num_streams)) < 0.4,
        truncated=rng.random((num_steps, num_streams)) < 0.4,
        final_obs=observations(num_steps, num_streams),
        valid=None,
        time=None,
        last_obs=observations(num_streams),
        progress=None,
    )
    policy = StochasticPolicy(actor_for(Discrete(2), Dict(place=Box(-9.0, 9.0, (2,)))), normaliser)
    rollout.terminated[-1], rollout.truncated[-1] = [False, True, False], [False, False, True]
    values, next_values = jax.jit(lambda rollout: state_values(policy, value_of, rollout, jnp.zeros((num_steps, num_streams, 1))))(rollout)

    def value(place):
        moments = None if normaliser is None else normaliser["place"]
        return value_of({"place": np.asarray(normalise(moments, place))}, None)

    assert (rollout.terminated & rollout.truncated).any()
    for t in range(num_steps):
        for n in range(num_streams):
            following = rollout.obs["place"][t + 1, n] if t + 1 < num_steps else rollout.last_obs["place"][n]
            ended = rollout.terminated[t, n] or rollout.truncated[t, n]
            np.testing.assert_allclose(values[t, n], value(rollout.obs["place"][t, n]), rtol=1e-5)
            np.testing.assert_allclose(next_values[t, n], value(rollout.final_obs["place"][t, n] if ended else following), rtol=1e-5)


def test_actor_and_critic_take_dictionaries():
    space = Dict(a=Discrete(2), b=Box(-1.0, 1.0, (2,)))
    obs = {"a": np.int32(1), "b": np.zeros(2, np.float32)}
    assert distribution_of(actor_for(Discrete(3), space), obs).log_probs.shape == (3,)
    assert critic_for(space)(obs, None).shape == ()
