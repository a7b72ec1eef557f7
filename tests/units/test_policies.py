"""Actors, critics, acting, and values of true successors."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete

from surefoot.distributions import Categorical, DiagonalGaussian
from surefoot.normalise import Moments, normalise
from surefoot.policies import Actor, Critic, StochasticPolicy, act, state_values
from surefoot.types import Rollout

OBSERVATIONS = Box(-9.0, 9.0, (3,))
SHAPE = {"hidden": (8,), "activation": "tanh"}
OBS = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
MOMENTS = Moments(jnp.asarray([1.0, 0.0, -1.0]), jnp.asarray([4.0, 1.0, 0.25]), jnp.asarray(10.0))


def actor_for(action_space, observation_space=OBSERVATIONS):
    return jax.jit(lambda key: Actor("mlp", observation_space, action_space, key, **SHAPE))(jax.random.key(0))


def critic_for(observation_space=OBSERVATIONS, seed=0):
    return jax.jit(lambda key: Critic("mlp", observation_space, key, **SHAPE))(jax.random.key(seed))


def test_a_discrete_actor_is_a_linear_head_on_its_torso():
    actor = actor_for(Discrete(4, start=2))
    distribution = actor(OBS[0])
    assert isinstance(distribution, Categorical)
    logits = actor.head.weight @ actor.torso(OBS[0]) + actor.head.bias
    np.testing.assert_allclose(distribution.log_probs, jax.nn.log_softmax(logits), rtol=1e-6)
    assert actor.log_std is None
    mask = jnp.asarray([True, False, True, False])
    np.testing.assert_allclose(actor(OBS[0], mask).log_probs, Categorical.from_logits(logits, mask).log_probs, rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
def test_a_continuous_actor_gives_a_mean_and_a_spread_for_each_number(shape):
    actor = actor_for(Box(-2.0, 5.0, shape))
    size = int(np.prod(shape))
    actor = eqx.tree_at(lambda actor: actor.log_std, actor, jnp.arange(size) / 10)
    distribution = actor(OBS[0])
    assert isinstance(distribution, DiagonalGaussian)
    np.testing.assert_allclose(distribution.mean, actor.head.weight @ actor.torso(OBS[0]), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(distribution.log_std, jnp.arange(size) / 10)


def test_policies_begin_near_uniform_or_near_zero_with_unit_spread():
    """A head of gain 0.01 on features within [-1, 1]: logits and means of at most 0.01 sqrt(8)."""
    probs = np.exp(jax.vmap(actor_for(Discrete(4)))(OBS).log_probs)
    assert np.abs(probs - 0.25).max() < 0.02
    assert np.ptp(probs) > 1e-5
    gaussian = jax.vmap(actor_for(Box(-1.0, 1.0, (2,))))(OBS)
    assert 1e-5 < np.abs(gaussian.mean).max() < 0.03
    np.testing.assert_array_equal(gaussian.log_std, 0.0)
    narrower = Actor("mlp", OBSERVATIONS, Box(-1.0, 1.0, (2,)), jax.random.key(0), initial_log_std=-0.5, **SHAPE)
    np.testing.assert_array_equal(jax.vmap(narrower)(OBS).log_std, -0.5)
    head = critic_for().head
    np.testing.assert_allclose(np.linalg.norm(head.weight), 1.0, rtol=1e-6)


def test_torso_and_head_have_keys_of_their_own():
    actor, critic = actor_for(Discrete(8)), critic_for(seed=1)
    assert np.abs(actor.torso.layers[0].weight - critic.torso.layers[0].weight).max() > 0.1


def test_a_critic_gives_one_number():
    critic = critic_for()
    assert critic(OBS[0]).shape == ()
    np.testing.assert_allclose(critic(OBS[0]), (critic.head.weight @ critic.torso(OBS[0]))[0], rtol=1e-6)


def test_a_policy_sees_normalised_observations():
    actor = actor_for(Discrete(4))
    policy = StochasticPolicy(actor, MOMENTS)
    expected = [actor(normalise(MOMENTS, row)).log_probs for row in OBS]
    np.testing.assert_allclose(policy.distribution(OBS).log_probs, np.stack(expected), rtol=1e-6)
    assert np.abs(policy.distribution(OBS).log_probs - StochasticPolicy(actor, None).distribution(OBS).log_probs).max() > 1e-5


def test_acting_takes_the_mode_or_draws_with_the_key():
    masks = jnp.asarray([[False, True, True, True]] * 5)
    policy = StochasticPolicy(actor_for(Discrete(4)), None)
    distribution = policy.distribution(OBS, masks)
    action, carry = act(None, policy, OBS, masks, "carry", None)
    np.testing.assert_array_equal(action, distribution.mode())
    assert carry == "carry"
    drawn = [act(None, policy, OBS, masks, None, jax.random.key(seed))[0] for seed in range(8)]
    np.testing.assert_array_equal(drawn[3], distribution.sample(jax.random.key(3)))
    assert all((action > 0).all() for action in drawn)
    assert len({tuple(action.tolist()) for action in drawn}) > 4


# Values


def value_of(obs):
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
    rollout.terminated[-1], rollout.truncated[-1] = [False, True, False], [False, False, True]
    values, next_values = jax.jit(lambda rollout: state_values(value_of, normaliser, rollout))(rollout)

    def value(place):
        moments = None if normaliser is None else normaliser["place"]
        return value_of({"place": np.asarray(normalise(moments, place))})

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
    assert actor_for(Discrete(3), space)(obs).log_probs.shape == (3,)
    assert critic_for(space)(obs).shape == ()
