"""TRPO in Lagrangian form: its steps by hand, where they end on the oracle, and where the multiplier settles."""

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
from gymnasium.spaces import Box
from jax.flatten_util import ravel_pytree
from oracle import TOLERANCE

from surefoot.algorithms import trpo_penalty
from surefoot.algorithms.trpo_penalty import TRPOPenalty, policy_step
from surefoot.audit import step_audit
from surefoot.critics import ValueTargets, critic_optimiser, fit_critic
from surefoot.distributions import Categorical
from surefoot.math.returns import gae
from surefoot.normalise import normalise
from surefoot.policies import StochasticPolicy
from surefoot.types import EnvironmentSpec

pytestmark = pytest.mark.usefixtures("x64")

ROWS = 8
SPEC = table_spec(num_observations=5, num_actions=3, num_envs=2)
Plain = partial(TRPOPenalty, normalise_reward=False, normalise_observation=False)
Whole = partial(Plain, num_steps=ROWS, minibatch_size=16, critic_epochs=2, critic_learning_rate=0.1, inner_steps=3, learning_rate=0.1)
DIRECTIONS = pytest.mark.parametrize("direction", ["old||new", "new||old"])

update = jax.jit(lambda config, state, rollout: trpo_penalty.update(config, state, rollout, None, jax.random.key(0)), static_argnums=0)


def first_state(config, logits=None, values=None, spec=SPEC):
    rng, size = np.random.default_rng(5), spec.observation_space.n
    actor = Table(jnp.asarray(rng.normal(size=(size, spec.action_space.n)) if logits is None else logits))
    critic = ValueTable(jnp.asarray(rng.normal(size=size) if values is None else values))
    start = trpo_penalty.init(config, spec, jax.random.key(0))
    return start._replace(acting=StochasticPolicy(actor, None), critic=critic, critic_optimiser=critic_optimiser(config, critic))


def logits(state):
    return np.asarray(state.acting.actor.logits)


def advantages(config, state, rollout, scale=1.0):
    """(generalised advantage estimates, values)"""
    values = values_of(state, rollout)
    flags, decays = (rollout.terminated, rollout.truncated), {"discount": config.gamma, "gae_lambda": config.gae_lambda}
    return np.asarray(gae(rollout.reward / scale, *values, *flags, **decays)), np.asarray(values[0])


def log_softmax(table):
    table = table - table.max(axis=-1, keepdims=True)
    return table - np.log(np.exp(table).sum(axis=-1, keepdims=True))


def kl_by_definition(table, old_table, rows, direction):
    """Mean KL over `rows`, pairs of time and stream, in the rollout's observations given as their first entries."""
    new, old = log_softmax(table), log_softmax(old_table)
    p, q = (old, new) if direction == "old||new" else (new, old)
    return np.mean([np.sum(np.exp(p[obs]) * (p[obs] - q[obs])) for obs, _, _ in rows])


def ascent_by_definition(table, old_table, rows, multiplier, direction):
    """Gradient of the mean of ratio advantage - multiplier KL over `rows` of (observation, action, advantage), in loops."""
    new, old, total = log_softmax(table), log_softmax(old_table), np.zeros(table.shape)
    for obs, action, advantage in rows:
        p, q = np.exp(new[obs]), np.exp(old[obs])
        total[obs] += p[action] / q[action] * advantage * ((np.arange(3) == action) - p)
        log_ratio = new[obs] - old[obs]
        of_kl = p - q if direction == "old||new" else p * (log_ratio - np.sum(p * log_ratio))
        total[obs] -= multiplier * of_kl
    return total / len(rows)


# The steps


@DIRECTIONS
@pytest.mark.parametrize("multiplier", [0.0, 3.0])
def test_each_batch_is_a_few_steps_of_a_new_adam_up_the_lagrangian(direction, multiplier):
    """The old policy and the advantages stay what they were, and rows that are not valid count for nothing."""
    config = Whole(kl_direction=direction)
    state = first_state(config)._replace(multiplier=jnp.asarray(multiplier))
    for seed in (1, 2):
        rollout = experience(SPEC, (5, 3), seed=seed)
        valid = np.random.default_rng(seed).random(rollout.valid.shape) < 0.8
        rollout = rollout._replace(valid=valid)
        state = state._replace(multiplier=jnp.asarray(multiplier))
        advantage, _ = advantages(config, state, rollout)
        counted = advantage[valid]
        advantage = (advantage - counted.mean()) / counted.std()
        rows = list(zip(rollout.obs[valid], rollout.action[valid], advantage[valid], strict=True))
        old = at = logits(state)
        first, second = np.zeros(at.shape), np.zeros(at.shape)
        for index in (1, 2, 3):
            gradient = -ascent_by_definition(at, old, rows, multiplier, direction)
            loss = -np.mean([np.exp(log_softmax(at)[obs, a] - log_softmax(old)[obs, a]) * advantage for obs, a, advantage in rows])
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            at = at - 0.1 * (first / (1 - 0.9**index)) / (np.sqrt(second / (1 - 0.999**index)) + 1e-8)
        state, metrics = update(config, state, rollout)
        np.testing.assert_allclose(logits(state), at, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(metrics["gradient_norm"], np.linalg.norm(gradient), rtol=1e-6)
        np.testing.assert_allclose(metrics["policy_loss"], loss, rtol=1e-6)  # of the surrogate alone, at the last gradient
        kl = kl_by_definition(at, old, rows, direction)
        np.testing.assert_allclose(metrics["constrained_kl"], kl, rtol=1e-6)
        other = kl_by_definition(at, old, rows, "new||old" if direction == "old||new" else "old||new")
        assert abs(kl / other - 1) > 1e-3


# The oracle: its trajectories, each in as many of 4096 streams as its probability comes to

MDP = oracle.random_mdp(0, discount=1.0)
BATCH = oracle.trajectories(MDP)
STREAMS = 4096


def played(theta):
    """A batch of episodes in the proportions in which `theta` plays them."""
    upper = np.cumsum(oracle.probability(theta, BATCH))
    index = np.searchsorted(upper, (np.arange(STREAMS) + 0.5) / STREAMS * upper[-1])
    every = oracle_rollout(MDP, BATCH)
    return every._replace(**{name: getattr(every, name)[:, index] for name in PER_ROW}, last_obs=every.last_obs[index])


@DIRECTIONS
def test_where_the_steps_end_the_surrogate_and_the_penalty_are_in_balance(direction):
    """At a great price the policy moves by the natural gradient divided by it: the other way to write a trust region."""
    theta, multiplier = oracle.random_logits(MDP, 1), 200.0
    config = Plain(inner_steps=2000, learning_rate=1e-5, kl_direction=direction)
    rollout = played(theta)
    policy, seen = StochasticPolicy(Table(theta), None), inputs(rollout.obs)
    old, advantage = distribution(policy, rollout.obs), oracle.row_advantages(MDP, theta, BATCH)
    upper = np.cumsum(oracle.probability(theta, BATCH))
    advantage = advantage[:, np.searchsorted(upper, (np.arange(STREAMS) + 0.5) / STREAMS * upper[-1])]
    step = jax.jit(partial(policy_step, config))
    moved, _, metrics = step(policy, jnp.asarray(multiplier), rollout, seen, old, advantage)
    assert metrics["gradient_norm"] < 1e-6

    probs, gradient, fisher = np.asarray(jax.nn.softmax(theta)), np.zeros((3, 2)), np.zeros((3, 2, 2))
    for t, n in zip(*np.nonzero(rollout.valid), strict=True):
        state = rollout.obs[t, n] % 3
        scores = np.eye(2) - probs[state]
        gradient[state] += advantage[t, n] * scores[rollout.action[t, n]]
        fisher[state] += np.einsum("a,ai,aj->ij", probs[state], scores, scores)
    natural = np.stack([np.linalg.pinv(fisher[state]) @ gradient[state] for state in range(3)])
    step = np.asarray(moved.actor.logits - theta)
    np.testing.assert_allclose(multiplier * step, natural, atol=0.01 * np.abs(natural).max())
    assert np.abs(natural).max() > 0.1


def settle(config, theta, iterations):
    """The divergence of each step while the same policy acts, and the multipliers: the constraint is the same problem each time."""
    size = (MDP.horizon + 1) * len(MDP.start)
    value = oracle.values(MDP, theta)[0].ravel()
    state = first_state(config, theta, value, table_spec(size, 2, STREAMS))
    rollout, acting, kls, multipliers = played(theta), state.acting, [], []
    for _ in range(iterations):
        state, metrics = update(config, state._replace(acting=acting), rollout)
        new = state.acting.actor.logits
        pair = (theta, new) if config.kl_direction == "old||new" else (new, theta)
        log_p, log_q = (np.asarray(oracle.log_policy(one)) for one in pair)
        visits = np.asarray(oracle.state_distribution(MDP, theta)).sum(axis=0)
        kls.append(visits @ np.sum(np.exp(log_p) * (log_p - log_q), axis=-1) / visits.sum())
        np.testing.assert_allclose(metrics["constrained_kl"], kls[-1], rtol=0.01)
        multipliers.append(float(metrics["kl_multiplier"]))
    return np.array(kls), np.array(multipliers)


Settling = partial(Plain, gamma=1.0, gae_lambda=1.0, num_steps=3, minibatch_size=3 * STREAMS, critic_epochs=1, critic_learning_rate=1e-12)


@DIRECTIONS
@pytest.mark.parametrize("seed", [1, 2])
def test_with_the_defaults_the_divergence_settles_at_its_bound_where_the_constraint_is_active(direction, seed):
    theta = oracle.random_logits(MDP, seed)
    free, _ = settle(Settling(kl_direction=direction, multiplier=0.0, multiplier_step_size=0.0), theta, 1)
    assert free[0] > 0.02  # without a price the steps go further than they may
    kls, multipliers = settle(Settling(kl_direction=direction), theta, 40)
    np.testing.assert_allclose(kls[20:], 0.01, rtol=0.2)
    assert abs(kls[-1] / 0.01 - 1) < 0.1
    assert multipliers[-1] > 1.0


def test_the_divergence_settles_from_either_side():
    theta = oracle.random_logits(MDP, 1)
    too_cheap, up = settle(Settling(multiplier=0.0, multiplier_step_size=50.0), theta, 40)
    too_dear, down = settle(Settling(multiplier=20.0, multiplier_step_size=50.0), theta, 60)
    assert too_cheap[0] > 0.02
    assert too_dear[0] < 1e-3
    np.testing.assert_allclose([too_cheap[-1], too_dear[-1]], 0.01, rtol=0.05)
    np.testing.assert_allclose(up[-1], down[-1], rtol=0.05)


# Whole updates, on batches of 8 rows of 2 environments


@DIRECTIONS
def test_the_multiplier_takes_a_step_for_the_next_batch_and_is_never_negative(direction):
    state, rollout = first_state(Whole())._replace(multiplier=jnp.asarray(0.7)), experience(SPEC, (5, 3))
    after, metrics = update(Whole(kl_direction=direction), state, rollout)
    p, q = (Categorical.from_logits(one.acting.actor.logits[rollout.obs]) for one in (state, after))
    kl = float(jnp.mean(p.kl_to(q) if direction == "old||new" else q.kl_to(p)))
    np.testing.assert_allclose(metrics["constrained_kl"], kl, **TOLERANCE)
    assert kl > 0.01
    for step_size, max_kl in ((10.0, 0.01), (3.0, 0.01), (2.0, 2 * kl), (0.0, 0.01)):
        config = Whole(kl_direction=direction, multiplier_step_size=step_size, max_kl=max_kl)
        after, metrics = update(config, state, rollout)
        np.testing.assert_allclose(after.multiplier, 0.7 + step_size * (kl - max_kl), rtol=1e-9)
        assert metrics["kl_multiplier"] == 0.7  # the one that this batch was learned from with
    after, _ = update(Whole(kl_direction=direction, max_kl=10.0), state, rollout)
    assert after.multiplier == 0.0


def test_the_multiplier_of_the_first_batch_is_a_setting_and_the_one_in_the_state_counts():
    config, rollout = Whole(multiplier=1.5), experience(SPEC, (5, 3))
    assert first_state(config).multiplier == 1.5
    dear, _ = update(config, first_state(config)._replace(multiplier=jnp.asarray(30.0)), rollout)
    same, _ = update(Whole(multiplier=30.0), first_state(Whole(multiplier=30.0)), rollout)
    cheap, _ = update(config, first_state(config), rollout)
    np.testing.assert_array_equal(logits(dear), logits(same))
    assert np.max(np.abs(logits(dear) - logits(cheap))) > 0.01


def test_what_the_statistics_of_observations_move_is_audited_and_steers_nothing():
    config = TRPOPenalty(num_steps=ROWS, minibatch_size=16, hidden=(4,), inner_steps=2)
    spec = EnvironmentSpec("floats", FLOATS, Box(-1.0, 1.0, (2,), np.float64), 2)
    rollout = experience(spec, (5, 3))
    rollout = jax.tree.map(jnp.asarray, rollout._replace(obs=3.0 * rollout.obs + 1.0))
    state = trpo_penalty.init(config, spec, jax.random.key(0))
    actor = jax.tree.map(lambda x: x + 0.3, state.acting.actor)
    state = state._replace(acting=state.acting._replace(actor=actor))
    after, metrics = update(config, state, rollout)
    old, new, with_statistics = (
        distribution(policy, rollout.obs)
        for policy in (state.acting, after.acting._replace(normaliser=state.acting.normaliser), after.acting)
    )
    np.testing.assert_allclose(metrics["constrained_kl"], jnp.mean(old.kl_to(new)), rtol=1e-6)
    np.testing.assert_allclose(metrics["kl"], jnp.mean(old.kl_to(with_statistics)), rtol=1e-6)
    assert abs(metrics["kl"] / metrics["constrained_kl"] - 1) > 0.1


def test_the_critic_is_fitted_to_the_estimated_returns_and_goes_on_from_where_it_was():
    config = TRPOPenalty(num_steps=ROWS, minibatch_size=8, critic_epochs=3, hidden=(4,), inner_steps=2)
    spec = EnvironmentSpec("floats", FLOATS, Box(-1.0, 1.0, (2,), np.float64), 2)
    state, rollout = trpo_penalty.init(config, spec, jax.random.key(0)), jax.tree.map(jnp.asarray, experience(spec, (5, 3)))
    fitted = jax.jit(partial(fit_critic, config))
    for _ in range(2):
        scale = state.return_scale.scale()
        advantage, value = advantages(config, state, rollout, scale)
        targets = ValueTargets(normalise(state.acting.normaliser, rollout.obs), None, jnp.asarray(advantage + value), rollout.valid)
        critic, moments, fitting = fitted(state.critic, state.critic_optimiser, targets, jax.random.key(0))
        state, metrics = update(config, state, rollout)
        np.testing.assert_allclose(ravel_pytree(state.critic)[0], ravel_pytree(critic)[0], rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(ravel_pytree(state.critic_optimiser)[0], ravel_pytree(moments)[0], rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(metrics["value_loss"], fitting["value_loss"], rtol=1e-6)
        np.testing.assert_allclose(metrics["explained_variance"], 1 - np.var(advantage) / np.var(advantage + value), rtol=1e-6)


def test_what_the_critic_learns_does_not_reach_the_policy():
    rollout = experience(SPEC, (5, 3))
    configs = Whole(), Whole(critic_learning_rate=0.3, critic_epochs=5)
    afters = [update(config, first_state(config), rollout)[0] for config in configs]
    np.testing.assert_array_equal(logits(afters[0]), logits(afters[1]))
    assert np.max(np.abs(afters[0].critic.values - afters[1].critic.values)) > 0.1


def test_rows_of_a_reset_do_not_matter():
    config, rollout = Whole(), experience(SPEC, (3, 1), seed=5)
    plain, with_rows = (update(config, first_state(config), batches_of(stream, ROWS)[0]) for stream in (rollout, with_reset_rows(rollout)))
    np.testing.assert_allclose(logits(with_rows[0]), logits(plain[0]), **TOLERANCE)
    np.testing.assert_allclose(with_rows[0].critic.values, plain[0].critic.values, **TOLERANCE)
    np.testing.assert_allclose(with_rows[0].multiplier, plain[0].multiplier, **TOLERANCE)
    for name in plain[1]:
        np.testing.assert_allclose(with_rows[1][name], plain[1][name], **TOLERANCE, err_msg=name)
    assert np.max(np.abs(logits(plain[0]) - logits(first_state(config)))) > 0.1


def test_the_audit_is_of_the_whole_step_in_units_of_reward():
    config = Whole(normalise_reward=True, gamma=0.9, gae_lambda=0.8)
    state, rollout = first_state(config), experience(SPEC, (2, 3, 3))
    scale = state.return_scale
    state = state._replace(return_scale=scale._replace(moments=scale.moments._replace(variance=jnp.asarray(16.0))))
    after, metrics = update(config, state, rollout)
    advantage, _ = advantages(config, state, rollout, scale=4.0)
    old, new = (Categorical.from_logits(one.acting.actor.logits[rollout.obs]) for one in (state, after))
    for name, value in step_audit(old, new, rollout, jnp.asarray(4.0 * advantage), discount=0.9).items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-7, err_msg=name)
    assert metrics["kl"] > 1e-3
    assert after.return_scale.moments.count == 16


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("gamma", (0.0, 1.0), (-0.01, 1.01)),
        ("gae_lambda", (0.0, 1.0), (-0.01, 1.01)),
        ("max_kl", (1e-9,), (0.0, np.inf)),
        ("multiplier", (0.0, 10.0), (-0.01, np.inf)),
        ("multiplier_step_size", (0.0, 10.0), (-0.01, np.inf)),
        ("inner_steps", (1,), (0,)),
        ("learning_rate", (1e-9,), (0.0,)),
        ("num_steps", (1,), (0,)),
        ("critic_epochs", (1,), (0,)),
        ("minibatch_size", (1,), (0,)),
        ("critic_learning_rate", (1e-9,), (0.0,)),
    ],
)
def test_bounds(name, inside, outside):
    for value in inside:
        TRPOPenalty(**{name: value})
    for value in outside:
        with pytest.raises(ValueError, match=rf"^TRPOPenalty\.{name} must lie in"):
            TRPOPenalty(**{name: value})


def test_a_minibatch_that_does_not_divide_the_batch_is_refused():
    with pytest.raises(ValueError, match="minibatch_size=64 does not divide the batch of 8 steps x 2 environments = 16"):
        trpo_penalty.init(TRPOPenalty(num_steps=8), SPEC, jax.random.key(0))
