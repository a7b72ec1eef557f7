"""Vanilla policy gradient: its gradient summed over every trajectory of the oracle, its steps by hand, and how their size adapts."""

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
    oracle_rollout,
    table_spec,
    values_of,
    with_reset_rows,
)
from gymnasium.spaces import Box
from jax.flatten_util import ravel_pytree
from oracle import TOLERANCE

from surefoot.algorithms import vpg_adaptive
from surefoot.algorithms.vpg_adaptive import VPGAdaptive
from surefoot.audit import step_audit
from surefoot.critics import ValueTargets, critic_optimiser, fit_critic
from surefoot.distributions import Categorical
from surefoot.math.returns import gae
from surefoot.normalise import normalise
from surefoot.policies import StochasticPolicy
from surefoot.types import EnvironmentSpec

pytestmark = pytest.mark.usefixtures("x64")

MDP = oracle.random_mdp(0, discount=1.0)
BATCH = oracle.trajectories(MDP)
ROWS = 8
SPEC = table_spec(num_observations=5, num_actions=3, num_envs=2)
Plain = partial(VPGAdaptive, normalise_advantage=False, normalise_reward=False, normalise_observation=False)
Whole = partial(Plain, num_steps=ROWS, minibatch_size=16, critic_epochs=2, critic_learning_rate=0.1, learning_rate=0.125)

update = jax.jit(lambda config, state, rollout: vpg_adaptive.update(config, state, rollout, None, jax.random.key(0)), static_argnums=0)


def first_state(config, logits=None, values=None, spec=SPEC):
    rng, size = np.random.default_rng(5), spec.observation_space.n
    actor = Table(jnp.asarray(rng.normal(size=(size, spec.action_space.n)) if logits is None else logits))
    critic = ValueTable(jnp.asarray(rng.normal(size=size) if values is None else values))
    start = vpg_adaptive.init(config, spec, jax.random.key(0))
    moments = jax.tree.map(lambda x: jnp.zeros(actor.logits.size) if x.ndim else x, start.optimiser)
    policy = StochasticPolicy(actor, None)
    return start._replace(acting=policy, critic=critic, optimiser=moments, critic_optimiser=critic_optimiser(config, critic))


def logits(state):
    return np.asarray(state.acting.actor.logits)


def advantages(config, state, rollout, scale=1.0):
    """(generalised advantage estimates, values)"""
    values = values_of(state, rollout)
    flags, decays = (rollout.terminated, rollout.truncated), {"discount": config.gamma, "gae_lambda": config.gae_lambda}
    return np.asarray(gae(rollout.reward / scale, *values, *flags, **decays)), np.asarray(values[0])


def policy_gradient(table, rollout, weight):
    """Mean over rows of weight grad log pi, in loops."""
    probs, total = np.asarray(jax.nn.softmax(table)), np.zeros(table.shape)
    for t, n in np.ndindex(rollout.time.shape):
        score = -probs[rollout.obs[t, n]]
        score[rollout.action[t, n]] += 1
        total[rollout.obs[t, n]] += weight[t, n] * score
    return total / rollout.time.size


def test_an_update_follows_the_policy_gradient():
    """With exact values, every generalised advantage estimate is unbiased; rows after an episode's end do not count."""
    theta = oracle.random_logits(MDP, 1)
    value = oracle.values(MDP, theta)[0]
    config = Plain(gamma=1.0, gae_lambda=0.7, num_steps=3, minibatch_size=3, critic_epochs=1)
    state = first_state(config, theta, value.ravel(), table_spec(value.size, 2, 1))
    every = oracle_rollout(MDP, BATCH)

    def ascent(rows):
        rollout = every._replace(**jax.tree.map(lambda x: x[:, None], rows), last_obs=rows["final_obs"][-1:])
        after, _ = vpg_adaptive.update(config, state, rollout, None, jax.random.key(0))
        return -10.0 * jnp.sum(rows["valid"]) * after.optimiser.mu  # Adam's first moment, begun anew, is a tenth of the gradient

    estimates = oracle.compiled(jax.vmap(ascent, in_axes=1), {name: jnp.asarray(getattr(every, name)) for name in PER_ROW})
    mean = oracle.probability(theta, BATCH) @ estimates
    np.testing.assert_allclose(mean, oracle.objective_gradient(MDP, theta), **TOLERANCE)


@pytest.mark.parametrize("normalise_advantage", [False, True])
def test_each_batch_is_one_step_of_adam_of_the_size_in_the_state(normalise_advantage):
    config = Whole(normalise_advantage=normalise_advantage, target_kl=1e9)
    state, at = first_state(config), logits(first_state(config))
    first, second = np.zeros(at.shape), np.zeros(at.shape)
    for index, size in ((1, 0.125), (2, 0.1)):  # the second at the limit
        rollout = experience(SPEC, (5, 3), seed=index)
        weight, _ = advantages(config, state, rollout)
        if normalise_advantage:
            weight = (weight - weight.mean()) / weight.std()
        gradient = -policy_gradient(at, rollout, weight)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        log_prob = np.asarray(jax.nn.log_softmax(at))[rollout.obs, rollout.action]
        at = at - size * (first / (1 - 0.9**index)) / (np.sqrt(second / (1 - 0.999**index)) + 1e-8)
        state, metrics = update(config, state, rollout)
        np.testing.assert_allclose(logits(state), at, rtol=1e-7, atol=1e-7)
        np.testing.assert_allclose(metrics["learning_rate"], size, rtol=1e-12)
        np.testing.assert_allclose(metrics["gradient_norm"], np.linalg.norm(gradient), rtol=1e-7)
        np.testing.assert_allclose(metrics["policy_loss"], -np.mean(weight * log_prob), rtol=1e-7, atol=1e-9)


def test_the_step_size_adapts_to_how_far_the_policy_went():
    """Divided by 1.5 beyond two targets, multiplied by 1.5 within half of one, kept between them."""
    small = partial(Whole, learning_rate=0.03)
    state, rollout = first_state(small()), experience(SPEC, (5, 3))
    after, metrics = update(small(), state, rollout)
    old, new = (Categorical.from_logits(one.acting.actor.logits[rollout.obs]) for one in (state, after))
    kl = float(jnp.mean(old.kl_to(new)))
    np.testing.assert_allclose(metrics["step_kl"], kl, **TOLERANCE)
    assert abs(metrics["step_kl"] - jnp.mean(new.kl_to(old))) > 1e-7
    for target, expected in ((kl / 2.01, 0.02), (kl / 1.99, 0.03), (kl * 1.99, 0.03), (kl * 2.01, 0.045)):
        after, metrics = update(small(target_kl=target), state, rollout)
        np.testing.assert_allclose(after.learning_rate, expected, rtol=1e-12)
        np.testing.assert_allclose(metrics["learning_rate"], 0.03, rtol=1e-12)  # the one that this step was taken with


@pytest.mark.parametrize(("target", "start", "limit"), [(1e9, 0.09, 0.1), (1e-30, 1.2e-6, 1e-6)])
def test_the_step_size_stays_within_its_limits(target, start, limit):
    config = Whole(target_kl=target, learning_rate=start)
    after, _ = update(config, first_state(config), experience(SPEC, (5, 3)))
    np.testing.assert_allclose(after.learning_rate, limit, rtol=1e-12)


def test_what_the_statistics_of_observations_move_is_audited_and_steers_nothing():
    config = VPGAdaptive(num_steps=ROWS, minibatch_size=16, learning_rate=1e-2, hidden=(4,))
    spec = EnvironmentSpec("floats", FLOATS, Box(-1.0, 1.0, (2,), np.float64), 2)
    rollout = experience(spec, (5, 3))
    rollout = jax.tree.map(jnp.asarray, rollout._replace(obs=3.0 * rollout.obs + 1.0))
    state = vpg_adaptive.init(config, spec, jax.random.key(0))
    actor = jax.tree.map(lambda x: x + 0.3, state.acting.actor)
    state = state._replace(acting=state.acting._replace(actor=actor))
    after, metrics = update(config, state, rollout)
    old, new, with_statistics = (
        distribution(policy, rollout.obs)
        for policy in (state.acting, after.acting._replace(normaliser=state.acting.normaliser), after.acting)
    )
    np.testing.assert_allclose(metrics["step_kl"], jnp.mean(old.kl_to(new)), rtol=1e-6)
    np.testing.assert_allclose(metrics["kl"], jnp.mean(old.kl_to(with_statistics)), rtol=1e-6)
    assert abs(metrics["kl"] / metrics["step_kl"] - 1) > 0.1


def test_the_critic_is_fitted_to_the_estimated_returns_after_the_step():
    config = VPGAdaptive(num_steps=ROWS, minibatch_size=8, critic_epochs=3, hidden=(4,))
    spec = EnvironmentSpec("floats", FLOATS, Box(-1.0, 1.0, (2,), np.float64), 2)
    state, rollout = vpg_adaptive.init(config, spec, jax.random.key(0)), jax.tree.map(jnp.asarray, experience(spec, (5, 3)))
    after, metrics = update(config, state, rollout)
    advantage, value = advantages(config, state, rollout)
    targets = ValueTargets(normalise(state.acting.normaliser, rollout.obs), None, jnp.asarray(advantage + value), rollout.valid)
    critic, moments, fitting = jax.jit(partial(fit_critic, config))(state.critic, state.critic_optimiser, targets, jax.random.key(0))
    np.testing.assert_allclose(ravel_pytree(after.critic)[0], ravel_pytree(critic)[0], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(ravel_pytree(after.critic_optimiser)[0], ravel_pytree(moments)[0], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(metrics["value_loss"], fitting["value_loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["explained_variance"], 1 - np.var(advantage) / np.var(advantage + value), rtol=1e-6)
    again, _ = update(config, after, rollout)
    assert np.any(ravel_pytree(again.critic)[0] != ravel_pytree(after.critic)[0])


def test_what_the_critic_learns_does_not_reach_the_policy():
    rollout = experience(SPEC, (5, 3))
    configs = Whole(), Whole(critic_learning_rate=0.3, critic_epochs=5)
    afters = [update(config, first_state(config), rollout)[0] for config in configs]
    np.testing.assert_array_equal(logits(afters[0]), logits(afters[1]))
    assert np.max(np.abs(afters[0].critic.values - afters[1].critic.values)) > 0.1


def test_rows_of_a_reset_do_not_matter():
    config, rollout = Whole(normalise_advantage=True), experience(SPEC, (3, 1), seed=5)
    plain, with_rows = (update(config, first_state(config), batches_of(stream, ROWS)[0]) for stream in (rollout, with_reset_rows(rollout)))
    for state in (plain[0], with_rows[0]):
        np.testing.assert_allclose(logits(state), logits(plain[0]), **TOLERANCE)
        np.testing.assert_allclose(state.critic.values, plain[0].critic.values, **TOLERANCE)
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
        ("target_kl", (1e-9,), (0.0,)),
        ("learning_rate", (1e-9,), (0.0,)),
        ("num_steps", (1,), (0,)),
        ("critic_epochs", (1,), (0,)),
        ("minibatch_size", (1,), (0,)),
        ("critic_learning_rate", (1e-9,), (0.0,)),
    ],
)
def test_bounds(name, inside, outside):
    for value in inside:
        VPGAdaptive(**{name: value})
    for value in outside:
        with pytest.raises(ValueError, match=rf"^VPGAdaptive\.{name} must lie in"):
            VPGAdaptive(**{name: value})


def test_a_minibatch_that_does_not_divide_the_batch_is_refused():
    with pytest.raises(ValueError, match="minibatch_size=64 does not divide the batch of 8 steps x 2 environments = 16"):
        vpg_adaptive.init(VPGAdaptive(num_steps=8), SPEC, jax.random.key(0))
