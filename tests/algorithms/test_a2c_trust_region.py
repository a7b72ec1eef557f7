"""A2C in a trust region: its gradient on the oracle, whole updates in loops where the bound holds and where it does not, the average."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from batches import (
    FLOATS,
    PER_ROW,
    Table,
    ValueTable,
    batches_of,
    experience,
    inputs,
    oracle_rollout,
    table_spec,
    values_of,
    with_reset_rows,
)
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from jax.flatten_util import ravel_pytree
from oracle import TOLERANCE

from surefoot.algorithms import a2c, a2c_trust_region
from surefoot.algorithms.a2c_trust_region import A2CTrustRegion, Batch, directions, loss, statistics
from surefoot.audit import step_audit
from surefoot.distributions import Categorical, DiagonalGaussian, MultiCategorical
from surefoot.math.returns import gae
from surefoot.minibatches import clipped_optimiser
from surefoot.policies import StochasticPolicy, distributions_of
from surefoot.types import EnvironmentSpec

pytestmark = pytest.mark.usefixtures("x64")

MDP = oracle.random_mdp(0, discount=1.0)
BATCH = oracle.trajectories(MDP)
ROWS = 8
SPEC = table_spec(num_observations=5, num_actions=3, num_envs=2)
Plain = partial(
    A2CTrustRegion,
    normalise_reward=False,
    normalise_observation=False,
    max_grad_norm=np.inf,
    entropy_coef=0.0,
    learning_rate_schedule="constant",
)
Whole = partial(Plain, num_steps=ROWS, gamma=0.9, learning_rate=0.1, max_kl_slope=0.05)

update = jax.jit(lambda config, state, rollout: a2c_trust_region.update(config, state, rollout, None, jax.random.key(0)), static_argnums=0)


def first_state(config, logits=None, values=None, average=None, spec=SPEC):
    rng, size = np.random.default_rng(5), spec.observation_space.n
    actor = Table(jnp.asarray(rng.normal(size=(size, spec.action_space.n)) if logits is None else logits))
    critic = ValueTable(jnp.asarray(rng.normal(size=size) if values is None else values))
    start = a2c_trust_region.init(config, spec, jax.random.key(0))
    return start._replace(
        acting=StochasticPolicy(actor, None),
        critic=critic,
        average=Table(actor.logits + rng.normal(size=actor.logits.shape) if average is None else jnp.asarray(average)),
        optimiser=clipped_optimiser(config).init(ravel_pytree((actor, critic))[0]),
    )


def parameters(state):
    return np.asarray(ravel_pytree((state.acting.actor, state.critic))[0])


def test_an_update_at_the_average_follows_the_policy_gradient():
    """There the divergence has no slope, and not even a small bound holds anything back."""
    theta = oracle.random_logits(MDP, 1)
    value = oracle.values(MDP, theta)[0].ravel()
    config = Plain(gamma=1.0, gae_lambda=0.7, num_steps=3, optimiser="adam", max_kl_slope=1e-6)
    state = first_state(config, theta, value, theta, table_spec(value.size, 2, 1))
    every = oracle_rollout(MDP, BATCH)

    def ascent(rows):
        rollout = every._replace(**jax.tree.map(lambda x: x[:, None], rows), last_obs=rows["final_obs"][-1:])
        after, _ = a2c_trust_region.update(config, state, rollout, None, jax.random.key(0))
        # Adam's first moment, begun anew, is a tenth of the gradient; the loss is a mean over rows.
        return -10.0 * jnp.sum(rows["valid"]) * after.optimiser[1].mu[: theta.size]

    estimates = oracle.compiled(jax.vmap(ascent, in_axes=1), {name: jnp.asarray(getattr(every, name)) for name in PER_ROW})
    mean = oracle.probability(theta, BATCH) @ estimates
    np.testing.assert_allclose(mean, oracle.objective_gradient(MDP, theta), **TOLERANCE)


# Whole updates in loops, on batches of 8 rows of 2 environments


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum()


def advantages(config, state, rollout, scale=1.0):
    """(generalised advantage estimates, values)"""
    values = values_of(state, rollout)
    flags, decays = (rollout.terminated, rollout.truncated), {"discount": config.gamma, "gae_lambda": config.gae_lambda}
    return np.asarray(gae(rollout.reward / scale, *values, *flags, **decays)), np.asarray(values[0])


def gradient_by_definition(config, state, rollout):
    """Of actor and critic; and at which rows the bound held."""
    now, average, values = (np.asarray(x) for x in (state.acting.actor.logits, state.average.logits, state.critic.values))
    advantage, _ = advantages(config, state, rollout)
    weight = (advantage - advantage.mean()) / advantage.std() if config.normalise_advantage else advantage
    of_logits, of_values, held = np.zeros(now.shape), np.zeros(values.shape), np.zeros(advantage.shape, bool)
    for row in np.ndindex(advantage.shape):
        obs = rollout.obs[row]
        probs, entropy = softmax(now[obs]), -np.sum(softmax(now[obs]) * np.log(softmax(now[obs])))
        ascent = weight[row] * (np.eye(3)[rollout.action[row]] - probs) - config.entropy_coef * probs * (np.log(probs) + entropy)
        away = probs - softmax(average[obs])  # the gradient of KL(average || now) by the logits of now
        excess = away @ ascent - config.max_kl_slope
        held[row] = excess > 0
        ascent = ascent - max(0.0, excess / (away @ away)) * away
        of_logits[obs] -= ascent / held.size
        of_values[obs] -= config.value_coef * advantage[row] / held.size
    return np.concatenate([of_logits.ravel(), of_values]), held


def rmsprop(gradient, moments, _):
    mean_square = 0.99 * moments + 0.01 * gradient**2
    return gradient / np.sqrt(mean_square + 1e-5), mean_square


def adam(gradient, moments, index):
    first, second = 0.9 * moments[0] + 0.1 * gradient, 0.999 * moments[1] + 0.001 * gradient**2
    return first / (1 - 0.9**index) / (np.sqrt(second / (1 - 0.999**index)) + 1e-5), (first, second)


@pytest.mark.parametrize("settings", [{}, {"entropy_coef": 0.3, "value_coef": 2.0, "gae_lambda": 0.5}, {"normalise_advantage": True}])
@pytest.mark.parametrize(("optimiser", "step", "moments"), [("rmsprop", rmsprop, 1.0), ("adam", adam, (0.0, 0.0))])
def test_each_batch_is_one_step_of_the_optimiser_along_projected_gradients(optimiser, step, moments, settings):
    config = Whole(optimiser=optimiser, max_grad_norm=0.1, **settings)
    state = first_state(config)
    average = np.asarray(state.average.logits)
    for index in (1, 2, 3):
        rollout = experience(SPEC, (3, 2), unfinished=3, seed=index)
        (gradient, held), at, was = gradient_by_definition(config, state, rollout), parameters(state), state
        assert 0.1 < np.mean(held) < 0.9
        norm = np.linalg.norm(gradient)
        assert norm > 0.1
        direction, moments = step(gradient * 0.1 / norm, moments, index)
        state, metrics = update(config, state, rollout)
        np.testing.assert_allclose(parameters(state), at - 0.1 * direction, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-7)
        np.testing.assert_allclose(metrics["projected_fraction"], np.mean(held), **TOLERANCE)
        old, far = (Categorical.from_logits(logits[rollout.obs]) for logits in (was.acting.actor.logits, jnp.asarray(average)))
        np.testing.assert_allclose(metrics["average_kl"], np.mean(far.kl_to(old)), **TOLERANCE)
        average = 0.99 * average + 0.01 * np.asarray(state.acting.actor.logits)
        np.testing.assert_allclose(state.average.logits, average, **TOLERANCE)


def test_the_average_follows_its_decay():
    config = Whole(average_decay=0.25)
    state = first_state(config)
    after, _ = update(config, state, experience(SPEC, (5, 3)))
    np.testing.assert_allclose(after.average.logits, 0.25 * state.average.logits + 0.75 * after.acting.actor.logits, **TOLERANCE)


@pytest.mark.parametrize("optimiser", ["rmsprop", "adam"])
def test_without_a_bound_it_is_a2c(optimiser):
    settings = {"num_steps": ROWS, "optimiser": optimiser, "entropy_coef": 0.2, "normalise_reward": False, "normalise_observation": False}
    config, plain = A2CTrustRegion(**settings, max_kl_slope=np.inf), a2c.A2C(**settings)
    state, rollout = first_state(config), experience(SPEC, (5, 3))
    same = a2c.init(plain, SPEC, jax.random.key(0))._replace(acting=state.acting, critic=state.critic, optimiser=state.optimiser)
    (after, metrics), (other, other_metrics) = update(config, state, rollout), a2c.update(plain, same, rollout, None, jax.random.key(0))
    np.testing.assert_allclose(parameters(after), parameters(other), rtol=1e-9, atol=1e-12)
    assert metrics["projected_fraction"] == 0.0
    for name in other_metrics:
        np.testing.assert_allclose(metrics[name], other_metrics[name], rtol=1e-7, atol=1e-12, err_msg=name)


# The projection, for every kind of action


def pair(space):
    """Distributions [4, 2] of the policy and of the average, of the same kind, and an action of each row."""
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(size=(2, 4, 2, 5)))
    if isinstance(space, Discrete):
        mask = (np.arange(5) != 2) | (rng.random((4, 2, 5)) < 0.5)
        return *(Categorical.from_logits(each, mask) for each in logits), rng.choice([0, 1, 3, 4], size=(4, 2))
    if isinstance(space, MultiDiscrete):
        return *(MultiCategorical.from_logits(each, (2, 3)) for each in logits), rng.integers(2, size=(4, 2, 2))
    return *(DiagonalGaussian(each[..., :2], each[..., 2:4] / 2) for each in logits), rng.normal(size=(4, 2, 2))


@pytest.mark.parametrize("space", [Discrete(5), MultiDiscrete([2, 3]), Box(-1.0, 1.0, (2,))], ids=lambda space: type(space).__name__)
def test_a_step_along_the_projection_raises_the_divergence_no_faster_than_the_bound(space):
    now, average, action = pair(space)
    advantage = jnp.asarray(np.random.default_rng(2).normal(size=(4, 2)))
    config, size = Plain(max_kl_slope=0.1, entropy_coef=0.05), 1e-6
    along, gradient = directions(config, now, average, action, advantage)

    def moved(step):
        """The distributions whose logits, or means and log standard deviations, are a little further along."""
        vector, unravel = ravel_pytree(jax.tree.map(lambda x: x[0, 0], now))
        assert vector.size == step.shape[-1]
        change = jax.vmap(jax.vmap(unravel))(size * step)
        return jax.tree.map(jnp.add, now, change).free()

    def slope(of, step):
        return (of(moved(step)) - of(moved(-step))) / (2 * size)

    before, after = (np.asarray(slope(average.kl_to, step)) for step in (gradient, along))
    binds = before > 0.1
    assert 0 < np.mean(binds) < 1
    np.testing.assert_allclose(after[binds], 0.1, rtol=1e-6)
    np.testing.assert_array_equal(along[~binds], gradient[~binds])
    for index in np.ndindex(gradient.shape):  # g is the gradient of each row's objective
        unit = np.zeros(gradient.shape)
        unit[index] = 1.0

        def objective(distribution, index=index):
            return advantage[index[:2]] * distribution.log_prob(action)[index[:2]] + 0.05 * distribution.entropy()[index[:2]]

        np.testing.assert_allclose(gradient[index], slope(objective, jnp.asarray(unit)), atol=1e-7)


def test_the_loss_has_the_projected_gradient_by_the_statistics():
    rng = np.random.default_rng(0)
    params = Table(jnp.asarray(rng.normal(size=(5, 3)))), ValueTable(jnp.asarray(rng.normal(size=5)))
    obs, valid, value_target = rng.integers(5, size=(4, 2)), np.ones((4, 2), bool), rng.normal(size=(4, 2))
    along = rng.normal(size=(4, 2, 3))
    along -= along.mean(axis=-1, keepdims=True)  # of logits, as the gradient of every function of probabilities is
    valid[3, 1] = False
    batch = Batch(inputs(obs), along, value_target, valid)
    gradient = jax.grad(lambda params: loss(params, batch, Plain())[0])(params)
    of_logits, of_values = np.zeros((5, 3)), np.zeros(5)
    for row in zip(*np.nonzero(valid), strict=True):
        of_logits[obs[row]] -= along[row] / 7
        of_values[obs[row]] += 0.5 * (params[1].values[obs[row]] - value_target[row]) / 7
    np.testing.assert_allclose(gradient[0].logits, of_logits, **TOLERANCE)
    np.testing.assert_allclose(gradient[1].values, of_values, **TOLERANCE)


@pytest.mark.parametrize("settings", [{"memory": "gru", "memory_size": 3}, {"shared_trunk": True}, {"memory": "gru", "shared_trunk": True}])
@pytest.mark.parametrize("space", [Discrete(3), Box(-1.0, 1.0, (2,), np.float64)], ids=["discrete", "continuous"])
def test_memories_and_shared_trunks_are_learned_as_by_a2c(space, settings):
    """Without a bound the step is A2C's; the average has a memory of its own, which begins with the policy's."""
    common = {"num_steps": ROWS, "hidden": (4,), "memory_size": 3, **settings}
    config, spec = A2CTrustRegion(**common, max_kl_slope=np.inf), EnvironmentSpec("floats", FLOATS, space, 2)
    state = a2c_trust_region.init(config, spec, jax.random.key(0))
    carry = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3))) if config.memory == "gru" else None
    rollout = experience(spec, (5,), begun=2, unfinished=3)._replace(carry=carry)
    rollout = jax.tree.map(jnp.asarray, rollout)
    plain = a2c.A2C(**common)
    same = a2c.init(plain, spec, jax.random.key(0))
    after, other = update(config, state, rollout)[0], a2c.update(plain, same, rollout, None, jax.random.key(0))[0]
    np.testing.assert_allclose(parameters(after), parameters(other), rtol=1e-5, atol=1e-7)

    far = jax.tree.map(lambda x: x + 0.3, state.average)
    _, metrics = update(config, state._replace(average=far), rollout)
    observed = a2c_trust_region.estimate(config, state.acting, state.critic, state.return_scale, rollout)
    average = distributions_of(far, observed.inputs._replace(carry=None if carry is None else carry[None]))
    np.testing.assert_allclose(metrics["average_kl"], jnp.mean(average.kl_to(observed.old)), rtol=1e-5)
    assert statistics(average).shape == (ROWS, 2, 3 if isinstance(space, Discrete) else 4)


def test_rows_of_a_reset_do_not_matter():
    config, rollout = Whole(normalise_advantage=True, entropy_coef=0.1), experience(SPEC, (3, 1), seed=5)
    plain, with_rows = (update(config, first_state(config), batches_of(stream, ROWS)[0]) for stream in (rollout, with_reset_rows(rollout)))
    np.testing.assert_allclose(parameters(with_rows[0]), parameters(plain[0]), **TOLERANCE)
    for name in plain[1]:
        np.testing.assert_allclose(with_rows[1][name], plain[1][name], **TOLERANCE, err_msg=name)
    assert np.max(np.abs(parameters(plain[0]) - parameters(first_state(config)))) > 0.01
    assert 0 < plain[1]["projected_fraction"] < 1


def test_the_learning_rate_follows_the_progress_of_the_run():
    scheduled = Whole(learning_rate=0.2, learning_rate_schedule="linear")
    state, rollout = first_state(scheduled), experience(SPEC, (5, 3))
    middle, end = (update(scheduled, state, rollout._replace(progress=np.float32(progress))) for progress in (0.5, 1.0))
    np.testing.assert_allclose([middle[1]["learning_rate"], end[1]["learning_rate"]], [0.1, 0.0], rtol=1e-7)
    np.testing.assert_array_equal(parameters(end[0]), parameters(state))
    constant, metrics = update(Whole(), state, rollout._replace(progress=np.float32(0.9)))
    np.testing.assert_allclose(parameters(middle[0]), parameters(constant), rtol=1e-6)
    np.testing.assert_allclose(metrics["learning_rate"], 0.1, rtol=1e-7)


def test_the_audit_is_of_the_whole_step_in_units_of_reward():
    config = Whole(normalise_reward=True, gae_lambda=0.8)
    state, rollout = first_state(config), experience(SPEC, (2, 3, 3))
    scale = state.return_scale
    state = state._replace(return_scale=scale._replace(moments=scale.moments._replace(variance=jnp.asarray(16.0))))
    after, metrics = update(config, state, rollout)
    advantage, _ = advantages(config, state, rollout, scale=4.0)
    old, new = (Categorical.from_logits(one.acting.actor.logits[rollout.obs]) for one in (state, after))
    for name, value in step_audit(old, new, rollout, jnp.asarray(4.0 * advantage), discount=0.9).items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-7, err_msg=name)
    np.testing.assert_allclose(metrics["policy_loss"], -np.mean(advantage * old.log_prob(rollout.action)), rtol=1e-7)
    assert metrics["kl"] > 1e-6
    assert after.return_scale.moments.count == 16


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("gamma", (0.0, 1.0), (-0.01, 1.01)),
        ("gae_lambda", (0.0, 1.0), (-0.01, 1.01)),
        ("max_kl_slope", (0.0, np.inf), (-0.01,)),
        ("average_decay", (0.0, 1.0), (-0.01, 1.01)),
        ("num_steps", (1,), (0,)),
        ("learning_rate", (1e-9,), (0.0,)),
        ("max_grad_norm", (0.5, np.inf), (0.0,)),
        ("entropy_coef", (0.0, 1.0), (-0.01,)),
        ("value_coef", (0.0, 1.0), (-0.01,)),
    ],
)
def test_bounds(name, inside, outside):
    for value in inside:
        A2CTrustRegion(**{name: value})
    for value in outside:
        with pytest.raises(ValueError, match=rf"^A2CTrustRegion\.{name} must lie in"):
            A2CTrustRegion(**{name: value})
