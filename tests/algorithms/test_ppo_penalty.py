"""PPO with a KL penalty: its gradient on the oracle, penalty and all, its loss in loops, and how the coefficient adapts."""

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
    distribution,
    experience,
    inputs,
    oracle_rollout,
    table_spec,
    values_of,
    with_reset_rows,
)
from gymnasium.spaces import Discrete
from jax.flatten_util import ravel_pytree
from oracle import TOLERANCE

from surefoot.algorithms import ppo_penalty
from surefoot.algorithms.ppo_penalty import Batch, PPOPenalty, loss
from surefoot.audit import step_audit
from surefoot.distributions import Categorical
from surefoot.math.returns import gae, time_discount
from surefoot.minibatches import clipped_adam
from surefoot.policies import StochasticPolicy
from surefoot.types import EnvironmentSpec

pytestmark = pytest.mark.usefixtures("x64")

MDP = oracle.random_mdp(0)
UNDISCOUNTED = oracle.random_mdp(0, discount=1.0)
BATCH = oracle.trajectories(MDP)
FROZEN = 1e-300  # a learning rate that leaves every parameter as it is
Plain = partial(PPOPenalty, normalise_advantage=False, normalise_reward=False, normalise_observation=False, max_grad_norm=np.inf)
DIRECTIONS = pytest.mark.parametrize("direction", ["old||new", "new||old"])


# The gradient on the oracle


def expected_ascent(config, beta, theta, behaviour):
    """Expectation, over the trajectories of `behaviour`, of the loss's downhill direction at `theta`, summed over rows."""
    critic = ValueTable(jnp.zeros(4 * 3))
    advantage = time_discount(BATCH.time, discount=MDP.discount) * oracle.row_advantages(MDP, behaviour, BATCH)
    old = Categorical(oracle.log_policy(behaviour)[BATCH.state])
    zeros = np.zeros(BATCH.time.shape)
    every = Batch(inputs(oracle_rollout(MDP, BATCH).obs), BATCH.action, old, advantage, zeros, BATCH.valid)

    def ascent(batch):  # the loss is a mean over rows
        batch = jax.tree.map(lambda x: x[:, None], batch)
        gradient = jax.grad(lambda theta: loss((Table(theta), critic), batch, beta, config)[0])(theta)
        return -jnp.sum(batch.valid) * gradient.ravel()

    estimates = oracle.compiled(jax.vmap(ascent, in_axes=1), jax.tree.map(jnp.asarray, every))
    return oracle.probability(behaviour, BATCH) @ estimates


@DIRECTIONS
def test_at_the_old_policy_the_penalty_has_no_gradient_and_the_rest_is_the_policy_gradient(direction):
    theta = oracle.random_logits(MDP, 1)
    ascent = expected_ascent(Plain(kl_direction=direction), 3.0, theta, theta)
    np.testing.assert_allclose(ascent, oracle.objective_gradient(MDP, theta), **TOLERANCE)


@DIRECTIONS
def test_away_from_the_old_policy_the_penalty_has_the_gradient_of_its_divergence(direction):
    """By hand: of KL(q || p) to the logits of p it is p - q; of KL(p || q) it is p (log p / q - KL), at every state that is visited."""
    theta, behaviour = oracle.random_logits(MDP, 1), oracle.random_logits(MDP, 2)
    plain, penalised = (expected_ascent(Plain(kl_direction=direction), beta, theta, behaviour) for beta in (0.0, 3.0))
    log_p, log_q = np.asarray(oracle.log_policy(theta)), np.asarray(oracle.log_policy(behaviour))
    p, q = np.exp(log_p), np.exp(log_q)
    log_ratio = log_p - log_q
    gradient = p - q if direction == "old||new" else p * (log_ratio - np.sum(p * log_ratio, axis=1, keepdims=True))
    visits = np.asarray(oracle.state_distribution(MDP, behaviour)).sum(axis=0)
    np.testing.assert_allclose(penalised - plain, -3.0 * (visits[:, None] * gradient).ravel(), **TOLERANCE)
    assert np.max(np.abs(penalised - plain)) > 0.1


def test_an_update_follows_the_policy_gradient():
    """With exact values, every generalised advantage estimate is unbiased; rows after an episode's end do not count."""
    theta = oracle.random_logits(MDP, 1)
    value = oracle.values(UNDISCOUNTED, theta)[0]
    config = Plain(gamma=1.0, gae_lambda=0.7, epochs=1, num_steps=3, minibatch_size=3, learning_rate=FROZEN)
    state = first_state(config, theta, value.ravel(), table_spec(value.size, 2, 1))
    every = oracle_rollout(UNDISCOUNTED, BATCH)

    def ascent(rows):
        rollout = every._replace(**jax.tree.map(lambda x: x[:, None], rows), last_obs=rows["final_obs"][-1:])
        after, _ = ppo_penalty.update(config, state, rollout, None, jax.random.key(0))
        return -10.0 * jnp.sum(rows["valid"]) * after.optimiser[1].mu[: theta.size]

    estimates = oracle.compiled(jax.vmap(ascent, in_axes=1), {name: jnp.asarray(getattr(every, name)) for name in PER_ROW})
    mean = oracle.probability(theta, BATCH) @ estimates
    np.testing.assert_allclose(mean, oracle.objective_gradient(UNDISCOUNTED, theta), **TOLERANCE)


# The loss against a loop over rows

ROWS = 8
SPEC = table_spec(num_observations=5, num_actions=3, num_envs=2)


def minibatch():
    """Rows of another policy, in which the second action is forbidden at times; the last three do not count."""
    rng = np.random.default_rng(0)
    params = Table(jnp.asarray(rng.normal(size=(5, 3)))), ValueTable(jnp.asarray(rng.normal(size=5)))
    obs, action, mask = rng.integers(5, size=40), 2 * rng.integers(2, size=40), rng.random((40, 3)) < 0.5
    mask = mask | (np.arange(3) != 1)
    old = Categorical.from_logits(jnp.asarray(rng.normal(size=(40, 3))), mask)
    advantage, value_target = rng.normal(size=(2, 40))
    rows = Batch(inputs(obs, mask), action, old, advantage, value_target, np.arange(40) < 37)
    return params, jax.tree.map(lambda x: x[None], rows)


def loss_by_definition(params, batch, config, beta):
    batch = jax.tree.map(lambda x: x[0], batch)
    advantage, total = batch.advantage[:37], 0.0
    if config.normalise_advantage:
        advantage = (advantage - advantage.mean()) / advantage.std()
    for row, a in enumerate(advantage):
        allowed = batch.inputs.action_mask[row]
        new = np.exp(np.asarray(params[0].logits[batch.inputs.obs[row]])) * allowed
        new /= new.sum()
        old = np.exp(np.asarray(batch.old.log_probs[row]))
        p, q = (old, new) if config.kl_direction == "old||new" else (new, old)
        kl = sum(p[i] * np.log(p[i] / q[i]) for i in range(3) if allowed[i])
        entropy = -sum(new[i] * np.log(new[i]) for i in range(3) if allowed[i])
        error = params[1].values[batch.inputs.obs[row]] - batch.value_target[row]
        total += -new[batch.action[row]] / old[batch.action[row]] * a + beta * kl
        total += config.value_coef * error**2 / 2 - config.entropy_coef * entropy
    return total / 37


@pytest.mark.parametrize(
    "settings", [{}, {"kl_direction": "new||old"}, {"normalise_advantage": True}, {"value_coef": 2.0}, {"entropy_coef": 0.3}]
)
@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_loss_by_definition(settings, beta):
    params, batch = minibatch()
    value, metrics = loss(params, batch, beta, Plain(**settings))
    np.testing.assert_allclose(value, loss_by_definition(params, batch, Plain(**settings), beta), rtol=1e-7)
    if settings and (beta or "kl_direction" not in settings):
        assert abs(value - loss_by_definition(params, batch, Plain(), beta)) > 1e-3
    without = Plain(**settings | {"value_coef": 0.0, "entropy_coef": 0.0})
    np.testing.assert_allclose(metrics["policy_loss"], loss_by_definition(params, batch, without, beta), rtol=1e-7)


def test_actor_and_critic_have_their_gradients_apart():
    params, batch = minibatch()
    by_policy, by_value = (
        jax.grad(lambda params, name: loss(params, batch, 0.7, Plain())[1][name])(params, name) for name in ("policy_loss", "value_loss")
    )
    assert np.all(by_policy[1].values == 0)
    assert np.all(by_value[0].logits == 0)
    assert np.any(by_policy[0].logits != 0)
    errors = np.asarray(params[1].values)[batch.inputs.obs[0, :37]] - batch.value_target[0, :37]
    np.testing.assert_allclose(by_value[1].values, np.bincount(batch.inputs.obs[0, :37], errors, 5) / 37, rtol=1e-12)


# Whole updates, on batches of 8 rows of 2 environments

Whole = partial(Plain, num_steps=ROWS, minibatch_size=16, epochs=3, learning_rate=0.1)

update = jax.jit(lambda config, state, rollout: ppo_penalty.update(config, state, rollout, None, jax.random.key(0)), static_argnums=0)


def first_state(config, logits=None, values=None, spec=SPEC):
    rng, size = np.random.default_rng(5), spec.observation_space.n
    actor = Table(jnp.asarray(rng.normal(size=(size, spec.action_space.n)) if logits is None else logits))
    critic = ValueTable(jnp.asarray(rng.normal(size=size) if values is None else values))
    optimiser = clipped_adam(config).init(ravel_pytree((actor, critic))[0])
    start = ppo_penalty.init(config, spec, jax.random.key(0))
    return start._replace(acting=StochasticPolicy(actor, None), critic=critic, optimiser=optimiser)


def parameters(state):
    return np.asarray(ravel_pytree((state.acting.actor, state.critic))[0])


@DIRECTIONS
def test_every_epoch_is_held_to_the_policy_that_acted(direction):
    """Three steps of Adam on the loss of the whole batch, the old policy and the advantages staying what they were."""
    config = Whole(kl_penalty_coef=2.0, kl_direction=direction)
    state, rollout = first_state(config), jax.tree.map(jnp.asarray, experience(SPEC, (5, 3)))
    after, _ = update(config, state, rollout)

    values = values_of(state, rollout)
    advantage = gae(rollout.reward, *values, rollout.terminated, rollout.truncated, discount=0.99, gae_lambda=0.95)
    old = distribution(state.acting, rollout.obs)
    batch = Batch(inputs(rollout.obs), rollout.action, old, advantage, advantage + values[0], rollout.valid)
    at, unravel = ravel_pytree((state.acting.actor, state.critic))
    first, second = np.zeros(at.shape), np.zeros(at.shape)
    for index in (1, 2, 3):
        gradient = np.asarray(jax.grad(lambda flat: loss(unravel(flat), batch, 2.0, config)[0])(at))
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        at = at - 0.1 * (first / (1 - 0.9**index)) / (np.sqrt(second / (1 - 0.999**index)) + 1e-5)
    np.testing.assert_allclose(parameters(after), at, rtol=1e-9, atol=1e-9)


@DIRECTIONS
def test_the_coefficient_adapts_to_how_far_the_policy_went(direction):
    """Doubled beyond one and a half targets, halved within two thirds of one, kept between them."""
    near = partial(Whole, kl_direction=direction, kl_penalty_coef=0.5)
    state, rollout = first_state(near()), experience(SPEC, (5, 3))
    after, metrics = update(near(), state, rollout)
    p, q = (Categorical.from_logits(one.acting.actor.logits[rollout.obs]) for one in (state, after))
    kl = float(jnp.mean(p.kl_to(q) if direction == "old||new" else q.kl_to(p)))
    np.testing.assert_allclose(metrics["penalised_kl"], kl, **TOLERANCE)
    assert abs(metrics["penalised_kl"] - jnp.mean(q.kl_to(p) if direction == "old||new" else p.kl_to(q))) > 1e-5
    assert kl > 1e-3
    for target, expected in ((kl / 1.51, 1.0), (kl / 1.49, 0.5), (kl * 1.49, 0.5), (kl * 1.51, 0.25)):
        after, metrics = update(near(target_kl=target), state, rollout)
        assert after.kl_penalty_coef == expected
        assert metrics["kl_penalty_coefficient"] == 0.5  # the one that this batch was learned from with


def test_the_coefficient_in_the_state_is_the_one_that_counts_and_keeps_adapting():
    config, rollout = Whole(kl_penalty_coef=1.0, target_kl=1e9), experience(SPEC, (5, 3))
    state = first_state(config)._replace(kl_penalty_coef=jnp.asarray(4.0))
    held, metrics = update(config, state, rollout)
    assert (metrics["kl_penalty_coefficient"], held.kl_penalty_coef) == (4.0, 2.0)
    assert update(config, held, rollout)[0].kl_penalty_coef == 1.0
    expected, _ = update(Whole(kl_penalty_coef=4.0), first_state(Whole(kl_penalty_coef=4.0)), rollout)
    np.testing.assert_array_equal(parameters(held), parameters(expected))
    free, _ = update(config, first_state(config), rollout)
    assert np.max(np.abs(parameters(held) - parameters(free))) > 0.01


@pytest.mark.parametrize(("target", "start", "limit"), [(1e9, 1.5e-4, 1e-4), (1e-12, 9e3, 1e4), (1e9, 0.0, 1e-4)])
def test_an_adaptive_coefficient_stays_where_it_can_come_back_from(target, start, limit):
    config = Whole(target_kl=target, kl_penalty_coef=start, epochs=1)
    after, _ = update(config, first_state(config), experience(SPEC, (5, 3)))
    assert after.kl_penalty_coef == limit


def test_a_fixed_coefficient_has_no_limits():
    for coefficient in (0.0, 1e6):
        config = Whole(target_kl=None, kl_penalty_coef=coefficient, epochs=1)
        assert update(config, first_state(config), experience(SPEC, (5, 3)))[0].kl_penalty_coef == coefficient


def test_what_the_statistics_of_observations_move_is_audited_and_not_penalised():
    config = PPOPenalty(num_steps=ROWS, minibatch_size=16, epochs=2, learning_rate=1e-2, hidden=(4,))
    spec = EnvironmentSpec("floats", FLOATS, Discrete(3), 2)
    state, rollout = ppo_penalty.init(config, spec, jax.random.key(0)), experience(spec, (5, 3))
    rollout = jax.tree.map(jnp.asarray, rollout._replace(obs=3.0 * rollout.obs + 1.0))
    actor = jax.tree.map(lambda x: x + 0.3, state.acting.actor)
    state = state._replace(acting=state.acting._replace(actor=actor))
    after, metrics = update(config, state, rollout)
    old, new, with_statistics = (
        distribution(policy, rollout.obs)
        for policy in (state.acting, after.acting._replace(normaliser=state.acting.normaliser), after.acting)
    )
    np.testing.assert_allclose(metrics["penalised_kl"], jnp.mean(old.kl_to(new)), rtol=1e-6)
    np.testing.assert_allclose(metrics["kl"], jnp.mean(old.kl_to(with_statistics)), rtol=1e-6)
    assert abs(metrics["kl"] / metrics["penalised_kl"] - 1) > 0.1


def test_rows_of_a_reset_do_not_matter():
    """In one minibatch; in more, they change who shares one with whom."""
    config, rollout = Whole(normalise_advantage=True), experience(SPEC, (3, 1), seed=5)
    plain, with_rows = (update(config, first_state(config), batches_of(stream, ROWS)[0]) for stream in (rollout, with_reset_rows(rollout)))
    np.testing.assert_allclose(parameters(with_rows[0]), parameters(plain[0]), **TOLERANCE)
    for name in plain[1]:
        np.testing.assert_allclose(with_rows[1][name], plain[1][name], **TOLERANCE, err_msg=name)
    assert np.max(np.abs(parameters(plain[0]) - parameters(first_state(config)))) > 0.1


def test_the_learning_rate_follows_the_progress_of_the_run():
    scheduled = Whole(learning_rate=0.2, learning_rate_schedule="linear")
    state, rollout = first_state(scheduled), experience(SPEC, (5, 3))
    middle, end = (update(scheduled, state, rollout._replace(progress=np.float32(progress))) for progress in (0.5, 1.0))
    np.testing.assert_allclose([middle[1]["learning_rate"], end[1]["learning_rate"]], [0.1, 0.0], rtol=1e-7)
    np.testing.assert_array_equal(parameters(end[0]), parameters(state))
    constant, metrics = update(Whole(), state, rollout._replace(progress=np.float32(0.9)))
    np.testing.assert_allclose(parameters(middle[0]), parameters(constant), rtol=1e-6)
    np.testing.assert_allclose(metrics["learning_rate"], 0.1, rtol=1e-7)


def test_gradients_are_scaled_down_to_their_largest_norm():
    rollout = experience(SPEC, (5, 3))
    (free, metrics), (held, same) = (
        update(config, first_state(config), rollout) for config in (Whole(epochs=1), Whole(epochs=1, max_grad_norm=0.01))
    )
    free, held = (10 * after.optimiser[1].mu for after in (free, held))
    np.testing.assert_allclose(np.linalg.norm(free), metrics["gradient_norm"], **TOLERANCE)
    np.testing.assert_allclose(same["gradient_norm"], metrics["gradient_norm"], **TOLERANCE)
    np.testing.assert_allclose(held, free * 0.01 / np.linalg.norm(free), **TOLERANCE)
    assert metrics["gradient_norm"] > 0.1


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
    old, new = (Categorical(jax.nn.log_softmax(one.acting.actor.logits)[rollout.obs]) for one in (state, after))
    audit = step_audit(old, new, rollout, 4.0 * advantage, discount=0.9)
    for name, value in audit.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-7, err_msg=name)
    np.testing.assert_allclose(metrics["explained_variance"], 1 - np.var(advantage) / np.var(advantage + values[0]), rtol=1e-7)
    assert metrics["kl"] > 0.01
    assert after.return_scale.moments.count == 16


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("gamma", (0.0, 1.0), (-0.01, 1.01)),
        ("gae_lambda", (0.0, 1.0), (-0.01, 1.01)),
        ("kl_penalty_coef", (0.0, 10.0), (-0.01, np.inf)),
        ("target_kl", (1e-9, None), (0.0,)),
        ("num_steps", (1,), (0,)),
        ("epochs", (1,), (0,)),
        ("minibatch_size", (1,), (0,)),
        ("learning_rate", (1e-9,), (0.0,)),
        ("max_grad_norm", (0.5, np.inf), (0.0,)),
        ("entropy_coef", (0.0, 1.0), (-0.01,)),
        ("value_coef", (0.0, 1.0), (-0.01,)),
    ],
)
def test_bounds(name, inside, outside):
    for value in inside:
        PPOPenalty(**{name: value})
    for value in outside:
        with pytest.raises(ValueError, match=rf"^PPOPenalty\.{name} must lie in"):
            PPOPenalty(**{name: value})


def test_a_minibatch_that_does_not_divide_the_batch_is_refused():
    with pytest.raises(ValueError, match="minibatch_size=64 does not divide the batch of 8 steps x 2 environments = 16"):
        ppo_penalty.init(PPOPenalty(num_steps=8), SPEC, jax.random.key(0))
