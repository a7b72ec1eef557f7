"""A2C: its gradient summed over every trajectory of the oracle, its loss in loops, its optimisers by hand, and what each setting does."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from batches import PER_ROW, Table, ValueTable, batches_of, experience, inputs, oracle_rollout, table_spec, values_of, with_reset_rows
from jax.flatten_util import ravel_pytree
from oracle import TOLERANCE

from surefoot.algorithms import a2c
from surefoot.algorithms.a2c import A2C, Batch, loss
from surefoot.audit import step_audit
from surefoot.distributions import Categorical
from surefoot.math.returns import gae
from surefoot.minibatches import clipped_optimiser
from surefoot.policies import StochasticPolicy

pytestmark = pytest.mark.usefixtures("x64")

MDP = oracle.random_mdp(0, discount=1.0)
BATCH = oracle.trajectories(MDP)
ROWS = 8
SPEC = table_spec(num_observations=5, num_actions=3, num_envs=2)
NOT_NORMALISED = {"normalise_reward": False, "normalise_observation": False}
Plain = partial(A2C, **NOT_NORMALISED, max_grad_norm=np.inf, entropy_coef=0.0, learning_rate_schedule="constant")
Whole = partial(Plain, num_steps=ROWS, learning_rate=0.1)

update = jax.jit(lambda config, state, rollout: a2c.update(config, state, rollout, None, jax.random.key(0)), static_argnums=0)


def first_state(config, logits=None, values=None, spec=SPEC):
    rng, size = np.random.default_rng(5), spec.observation_space.n
    actor = Table(jnp.asarray(rng.normal(size=(size, spec.action_space.n)) if logits is None else logits))
    critic = ValueTable(jnp.asarray(rng.normal(size=size) if values is None else values))
    optimiser = clipped_optimiser(config).init(ravel_pytree((actor, critic))[0])
    return a2c.init(config, spec, jax.random.key(0))._replace(acting=StochasticPolicy(actor, None), critic=critic, optimiser=optimiser)


def parameters(state):
    return np.asarray(ravel_pytree((state.acting.actor, state.critic))[0])


# The gradient on the oracle


@pytest.mark.parametrize(("gae_lambda", "error"), [(1.0, 0.5), (0.7, 0.0)])
def test_an_update_follows_the_policy_gradient(gae_lambda, error):
    """With n-step returns of whole episodes whatever the values are, and with exact values whatever the trace decay is."""
    theta = oracle.random_logits(MDP, 1)
    value = oracle.values(MDP, theta)[0].ravel()
    value = value + error * np.random.default_rng(2).normal(size=value.shape)
    config = Plain(gamma=1.0, gae_lambda=gae_lambda, num_steps=3, optimiser="adam")
    state = first_state(config, theta, value, table_spec(value.size, 2, 1))
    every = oracle_rollout(MDP, BATCH)

    def ascent(rows):
        rollout = every._replace(**jax.tree.map(lambda x: x[:, None], rows), last_obs=rows["final_obs"][-1:])
        after, _ = a2c.update(config, state, rollout, None, jax.random.key(0))
        # Adam's first moment, begun anew, is a tenth of the gradient; the loss is a mean over rows.
        return -10.0 * jnp.sum(rows["valid"]) * after.optimiser[1].mu[: theta.size]

    estimates = oracle.compiled(jax.vmap(ascent, in_axes=1), {name: jnp.asarray(getattr(every, name)) for name in PER_ROW})
    mean = oracle.probability(theta, BATCH) @ estimates
    np.testing.assert_allclose(mean, oracle.objective_gradient(MDP, theta), **TOLERANCE)


# The loss against a loop over rows


def batch_of_rows():
    """[10, 4], the second action forbidden at times; the last rows of one stream do not count."""
    rng = np.random.default_rng(0)
    params = Table(jnp.asarray(rng.normal(size=(5, 3)))), ValueTable(jnp.asarray(rng.normal(size=5)))
    obs, action = rng.integers(5, size=(10, 4)), 2 * rng.integers(2, size=(10, 4))
    mask = (rng.random((10, 4, 3)) < 0.5) | (np.arange(3) != 1)
    advantage, value_target = rng.normal(size=(2, 10, 4))
    valid = np.ones((10, 4), bool)
    valid[7:, 1] = False
    return params, Batch(inputs(obs, mask), action, advantage, value_target, valid)


def loss_by_definition(params, batch, config):
    advantage, total = batch.advantage, {"policy": 0.0, "value": 0.0, "entropy": 0.0}
    if config.normalise_advantage:
        advantage = (advantage - advantage[batch.valid].mean()) / advantage[batch.valid].std()
    for row in zip(*np.nonzero(batch.valid), strict=True):
        allowed = batch.inputs.action_mask[row]
        probs = np.exp(np.asarray(params[0].logits[batch.inputs.obs[row]])) * allowed
        probs /= probs.sum()
        total["policy"] -= advantage[row] * np.log(probs[batch.action[row]])
        total["value"] += (params[1].values[batch.inputs.obs[row]] - batch.value_target[row]) ** 2 / 2
        total["entropy"] -= sum(probs[i] * np.log(probs[i]) for i in range(3) if allowed[i])
    return (total["policy"] + config.value_coef * total["value"] - config.entropy_coef * total["entropy"]) / 37


@pytest.mark.parametrize("settings", [{}, {"normalise_advantage": True}, {"value_coef": 2.0}, {"entropy_coef": 0.3}])
def test_loss_by_definition(settings):
    params, batch = batch_of_rows()
    value, metrics = loss(params, batch, Plain(**settings))
    np.testing.assert_allclose(value, loss_by_definition(params, batch, Plain(**settings)), rtol=1e-7)
    if settings:
        assert abs(value - loss_by_definition(params, batch, Plain())) > 1e-3
    alone = settings | {"value_coef": 0.0, "entropy_coef": 0.0}
    np.testing.assert_allclose(metrics["policy_loss"], loss_by_definition(params, batch, Plain(**alone)), rtol=1e-7)


def test_actor_and_critic_have_their_gradients_apart():
    params, batch = batch_of_rows()
    by_policy, by_value = (
        jax.grad(lambda params, name: loss(params, batch, Plain())[1][name])(params, name) for name in ("policy_loss", "value_loss")
    )
    assert np.all(by_policy[1].values == 0)
    assert np.all(by_value[0].logits == 0)
    assert np.any(by_policy[0].logits != 0)
    errors = np.asarray(params[1].values)[batch.inputs.obs] - batch.value_target
    expected = np.bincount(batch.inputs.obs[batch.valid], errors[batch.valid], 5) / 37
    np.testing.assert_allclose(by_value[1].values, expected, rtol=1e-12)


# Whole updates, on batches of 8 rows of 2 environments


def gradient_by_definition(config, state, rollout):
    """Of actor and critic, in loops, from n-step returns that reach to the end of the batch."""
    probs, values = np.asarray(jax.nn.softmax(state.acting.actor.logits)), np.asarray(state.critic.values)
    of_logits, of_values = np.zeros(probs.shape), np.zeros(values.shape)
    for n in range(2):
        for t in reversed(range(ROWS)):
            obs = rollout.obs[t, n]
            if rollout.terminated[t, n]:
                target = 0.0
            elif rollout.truncated[t, n]:
                target = values[rollout.final_obs[t, n]]
            elif t == ROWS - 1:
                target = values[rollout.last_obs[n]]
            target = rollout.reward[t, n] + config.gamma * target
            score = -probs[obs]
            score[rollout.action[t, n]] += 1
            of_logits[obs] -= (target - values[obs]) * score
            of_values[obs] += config.value_coef * (values[obs] - target)
    return np.concatenate([of_logits.ravel(), of_values]) / (2 * ROWS)


def rmsprop(gradient, moments, _):
    mean_square = 0.99 * moments + 0.01 * gradient**2
    return gradient / np.sqrt(mean_square + 1e-5), mean_square


def adam(gradient, moments, index):
    first, second = 0.9 * moments[0] + 0.1 * gradient, 0.999 * moments[1] + 0.001 * gradient**2
    return first / (1 - 0.9**index) / (np.sqrt(second / (1 - 0.999**index)) + 1e-5), (first, second)


@pytest.mark.parametrize(("optimiser", "step", "moments"), [("rmsprop", rmsprop, 1.0), ("adam", adam, (0.0, 0.0))])
def test_each_batch_is_one_step_of_the_optimiser_on_n_step_returns(optimiser, step, moments):
    config = Whole(optimiser=optimiser, gamma=0.9, max_grad_norm=0.2)
    state = first_state(config)
    for index in (1, 2, 3):
        rollout = experience(SPEC, (3, 2), unfinished=3, seed=index)
        gradient, at = gradient_by_definition(config, state, rollout), parameters(state)
        norm = np.linalg.norm(gradient)
        assert norm > 0.2
        direction, moments = step(gradient * 0.2 / norm, moments, index)
        state, metrics = update(config, state, rollout)
        np.testing.assert_allclose(parameters(state), at - 0.1 * direction, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-9)


def test_a_small_gradient_is_not_scaled():
    (free, metrics), (held, _) = (
        update(config, first_state(config), experience(SPEC, (5, 3))) for config in (Whole(), Whole(max_grad_norm=1e3))
    )
    np.testing.assert_allclose(parameters(free), parameters(held), **TOLERANCE)
    assert metrics["gradient_norm"] < 1e3


def test_rows_of_a_reset_do_not_matter():
    config, rollout = Whole(normalise_advantage=True, entropy_coef=0.1), experience(SPEC, (3, 1), seed=5)
    plain, with_rows = (update(config, first_state(config), batches_of(stream, ROWS)[0]) for stream in (rollout, with_reset_rows(rollout)))
    np.testing.assert_allclose(parameters(with_rows[0]), parameters(plain[0]), **TOLERANCE)
    for name in plain[1]:
        np.testing.assert_allclose(with_rows[1][name], plain[1][name], **TOLERANCE, err_msg=name)
    assert np.max(np.abs(parameters(plain[0]) - parameters(first_state(config)))) > 0.01


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
    config = Whole(normalise_reward=True, gamma=0.9, gae_lambda=0.8)
    state, rollout = first_state(config), experience(SPEC, (2, 3, 3))
    scale = state.return_scale
    state = state._replace(return_scale=scale._replace(moments=scale.moments._replace(variance=jnp.asarray(16.0))))
    after, metrics = update(config, state, rollout)
    flags, values = (
        (rollout.terminated, rollout.truncated),
        values_of(state, rollout),
    )
    advantage = gae(rollout.reward / 4.0, *values, *flags, discount=0.9, gae_lambda=0.8)
    old, new = (Categorical.from_logits(one.acting.actor.logits[rollout.obs]) for one in (state, after))
    for name, value in step_audit(old, new, rollout, 4.0 * advantage, discount=0.9).items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-7, err_msg=name)
    np.testing.assert_allclose(metrics["explained_variance"], 1 - np.var(advantage) / np.var(advantage + values[0]), rtol=1e-7)
    assert metrics["kl"] > 1e-6
    assert after.return_scale.moments.count == 16


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("gamma", (0.0, 1.0), (-0.01, 1.01)),
        ("gae_lambda", (0.0, 1.0), (-0.01, 1.01)),
        ("num_steps", (1,), (0,)),
        ("learning_rate", (1e-9,), (0.0,)),
        ("max_grad_norm", (0.5, np.inf), (0.0,)),
        ("entropy_coef", (0.0, 1.0), (-0.01,)),
        ("value_coef", (0.0, 1.0), (-0.01,)),
    ],
)
def test_bounds(name, inside, outside):
    for value in inside:
        A2C(**{name: value})
    for value in outside:
        with pytest.raises(ValueError, match=rf"^A2C\.{name} must lie in"):
            A2C(**{name: value})


def test_an_unknown_optimiser_is_refused():
    with pytest.raises(ValueError, match=r"^A2C\.optimiser expects one of 'rmsprop', 'adam', got 'sgd'"):
        A2C(optimiser="sgd")
