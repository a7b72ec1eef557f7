"""TRPO: its step against dense linear algebra, what the line search keeps and refuses, and what must not reach the policy."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import FLOATS, batches_of, distribution, experience, values_of, with_reset_rows
from gymnasium.spaces import Box, Discrete
from jax.flatten_util import ravel_pytree

from surefoot.algorithms import trpo
from surefoot.algorithms.trpo import TRPO, policy_step
from surefoot.audit import step_audit
from surefoot.critics import ValueTargets, fit_critic
from surefoot.math.returns import gae
from surefoot.normalise import Moments, normalise
from surefoot.policies import inputs_of
from surefoot.types import EnvironmentSpec

pytestmark = pytest.mark.usefixtures("x64")

ACTIONS = {"discrete": Discrete(3), "continuous": Box(-1.0, 1.0, (2,), np.float64)}
SMALL_STEP = 1e-4
Small = partial(TRPO, max_kl=SMALL_STEP, hidden=(4,), num_steps=24, minibatch_size=16, critic_epochs=2)
SINGULAR = Small(cg_damping=0.0, cg_iterations=200, fisher_fraction=0.01)


@partial(jax.jit, static_argnums=0)
def step(config, policy, rollout, old, advantage):
    return policy_step(config, policy, rollout, inputs_of(policy, rollout), old, advantage)


update = jax.jit(lambda config, state, rollout: trpo.update(config, state, rollout, None, jax.random.key(0)), static_argnums=0)
KINDS = pytest.mark.parametrize("kind", ACTIONS)


def spec_for(kind):
    return EnvironmentSpec(kind, FLOATS, ACTIONS[kind], 2)


def first_state(config, kind):
    """A policy far from uniform, with statistics of observations."""
    state = trpo.init(config, spec_for(kind), jax.random.key(0))
    actor = state.acting.actor
    flat, unravel = ravel_pytree(actor)
    actor = unravel(flat + 0.5 * np.random.default_rng(0).normal(size=flat.shape))
    normaliser = Moments(jnp.asarray([1.0, 0.0, -1.0]), jnp.asarray([4.0, 1.0, 0.25]), jnp.asarray(100.0))
    return state._replace(acting=state.acting._replace(actor=actor, normaliser=normaliser))


def situation(kind, seed=7):
    """(policy, rollout, the distribution that acted, advantage)."""
    rollout = experience(spec_for(kind), (3, 1, 5, 2, 4, 9))
    policy = first_state(Small(), kind).acting
    old = distribution(policy, rollout.obs)
    return policy, rollout, old, jnp.asarray(np.random.default_rng(seed).normal(size=rollout.time.shape))


def kl_between(policy, other, rollout, direction="old||new"):
    """Mean KL over the batch between two policies, each with its own normaliser."""
    p, q = (distribution(one, rollout.obs) for one in (policy, other))
    return float(jnp.mean(p.kl_to(q) if direction == "old||new" else q.kl_to(p)))


def flat(policy):
    return np.asarray(ravel_pytree(policy.actor)[0])


@cache
def dense(kind):
    """(gradient of the surrogate [D], Fisher matrix of each time step [T, D, D]), from scores alone."""
    policy, rollout, old, advantage = situation(kind)
    at, unravel = ravel_pytree(policy.actor)

    def at_parameters(parameters):
        return distribution(policy._replace(actor=unravel(parameters)), rollout.obs)

    score = jax.jit(jax.jacobian(lambda parameters: at_parameters(parameters).log_prob(rollout.action)))(at)
    gradient = jnp.mean(advantage[..., None] * score, axis=(0, 1))
    if kind == "discrete":
        scores = jax.jit(jax.jacobian(lambda parameters: at_parameters(parameters).log_probs))(at)
        fisher = jnp.einsum("tna,tnad,tnae->tde", jnp.exp(old.log_probs), scores, scores)
    else:  # of a normal distribution: of its mean, 1 / variance; of its log standard deviation, 2
        of_mean = jax.jit(jax.jacobian(lambda parameters: at_parameters(parameters).mean))(at)
        of_spread = jax.jit(jax.jacobian(lambda parameters: at_parameters(parameters).log_std))(at)
        fisher = jnp.einsum("tna,tnad,tnae->tde", jnp.exp(-2 * old.log_std), of_mean, of_mean)
        fisher += 2 * jnp.einsum("tnad,tnae->tde", of_spread, of_spread)
    return np.asarray(gradient), np.asarray(fisher) / rollout.time.shape[1]


def dense_step(kind, config, direction=None, steps=slice(None)):
    gradient, fisher = dense(kind)
    fisher = fisher[steps].mean(axis=0)
    if direction is None:
        direction = np.linalg.solve(fisher + config.cg_damping * np.eye(len(fisher)), gradient)
    return direction * np.sqrt(2 * config.max_kl / (direction @ fisher @ direction))


def step_taken(config, kind):
    policy, *_ = situation(kind)
    moved, metrics = step(config, *situation(kind))
    return (flat(moved) - flat(policy)) / metrics["step_scale"]


@pytest.mark.parametrize(("kind", "damping"), [("discrete", 0.1), ("continuous", 1.0)])
def test_the_step_is_the_natural_gradient_in_full_length_without_the_damping(kind, damping):
    config = Small(cg_iterations=60, cg_damping=damping)
    expected = dense_step(kind, config)
    np.testing.assert_allclose(step_taken(config, kind), expected, atol=1e-4 * np.abs(expected).max())


def test_one_iteration_goes_along_the_gradient():
    config = Small(cg_iterations=1)
    expected = dense_step("continuous", config, dense("continuous")[0])
    np.testing.assert_allclose(step_taken(config, "continuous"), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(("fraction", "steps"), [(0.7, [24 * k // 17 for k in range(17)]), (0.01, [0])])
def test_the_fisher_matrix_is_that_of_a_share_of_the_batch(fraction, steps):
    config = Small(cg_iterations=60, fisher_fraction=fraction)
    expected = dense_step("discrete", config, steps=steps)
    np.testing.assert_allclose(step_taken(config, "discrete"), expected, atol=1e-4 * np.abs(expected).max())


@KINDS
@pytest.mark.parametrize("direction", ["old||new", "new||old"])
def test_the_policy_moves_as_far_as_the_bound(kind, direction):
    """Within 5 %, to the second order: a step that the line search has shortened is shorter by the square of its scale."""
    config = Small(kl_direction=direction)
    policy, rollout, _, advantage = situation(kind)
    moved, metrics = step(config, *situation(kind))
    np.testing.assert_allclose(metrics["constrained_kl"], kl_between(policy, moved, rollout, direction), rtol=1e-9)
    np.testing.assert_allclose(metrics["constrained_kl"] / metrics["step_scale"] ** 2, SMALL_STEP, rtol=0.05)
    assert metrics["constrained_kl"] <= SMALL_STEP
    np.testing.assert_allclose(metrics["gradient_norm"], np.linalg.norm(dense(kind)[0]), rtol=1e-9)
    assert metrics["policy_loss"] < -jnp.mean(advantage)
    other = "new||old" if direction == "old||new" else "old||new"
    assert metrics["constrained_kl"] != pytest.approx(kl_between(policy, moved, rollout, other), rel=1e-6)


# Far beyond the region where the surrogate is linear and the divergence quadratic, the one or the other fails first.
TOO_FAR = pytest.mark.parametrize(("kind", "seed", "fails"), [("discrete", 3, "surrogate"), ("continuous", 5, "divergence")])


@TOO_FAR
def test_the_line_search_takes_the_longest_step_that_improves_within_the_bound(kind, seed, fails):
    config = Small(max_kl=10.0, backtrack_factor=0.6, backtrack_tries=20)
    policy, rollout, old, advantage = situation(kind, seed)
    moved, metrics = step(config, policy, rollout, old, advantage)
    at, unravel = ravel_pytree(policy.actor)
    full, tries = (flat(moved) - at) / metrics["step_scale"], int(metrics["line_search_tries"])

    def conditions(scale):
        candidate = policy._replace(actor=unravel(at + scale * full))
        new = distribution(candidate, rollout.obs)
        surrogate = jnp.mean(jnp.exp(new.log_prob(rollout.action) - old.log_prob(rollout.action)) * advantage)
        return {"surrogate": bool(surrogate > jnp.mean(advantage)), "divergence": kl_between(policy, candidate, rollout) <= 10.0}

    assert tries == 3
    for index in range(tries - 1):
        assert conditions(0.6**index) == {"surrogate": True, "divergence": True, fails: False}
    assert all(conditions(0.6 ** (tries - 1)).values())
    np.testing.assert_allclose(metrics["step_scale"], 0.6 ** (tries - 1), rtol=1e-6)


@TOO_FAR
def test_where_no_try_is_acceptable_the_policy_keeps_its_bits(kind, seed, fails):
    policy, *rest = situation(kind, seed)
    moved, metrics = step(Small(max_kl=1e3, backtrack_factor=0.99, backtrack_tries=3), policy, *rest)
    jax.tree.map(np.testing.assert_array_equal, moved, policy)
    assert (metrics["step_scale"], metrics["line_search_tries"], metrics["constrained_kl"]) == (0, 3, 0)


@pytest.mark.parametrize(("kind", "config"), [("discrete", Small()), ("continuous", Small()), ("discrete", SINGULAR)])
def test_without_advantages_there_is_no_step(kind, config):
    policy, rollout, old, advantage = situation(kind)
    moved, metrics = step(config, policy, rollout, old, jnp.zeros_like(advantage))
    jax.tree.map(np.testing.assert_array_equal, moved, policy)
    assert metrics["step_scale"] == metrics["gradient_norm"] == metrics["constrained_kl"] == 0
    assert all(np.isfinite(value) for value in metrics.values())


def test_a_singular_fisher_matrix_without_damping_does_no_harm():
    """A categorical distribution has a direction in which nothing changes, and a share of the batch does not see the whole gradient."""
    policy, rollout, old, advantage = situation("discrete")
    moved, metrics = step(SINGULAR, policy, rollout, old, advantage)
    assert np.isfinite(flat(moved)).all()
    assert kl_between(policy, moved, rollout) <= SMALL_STEP
    assert all(np.isfinite(value) for value in metrics.values())


# Whole updates


@KINDS
def test_an_update_is_the_step_on_generalised_advantages_then_the_critic_then_the_statistics(kind):
    """Rewards are divided by their scale while learning, and what the audit promises is multiplied by it."""
    config = Small()
    state, rollout = first_state(config, kind), jax.tree.map(jnp.asarray, experience(spec_for(kind), (3, 1, 5, 2, 4, 9)))
    moments = state.return_scale.moments._replace(variance=jnp.asarray(16.0))
    state = state._replace(return_scale=state.return_scale._replace(moments=moments))
    after, metrics = update(config, state, rollout)

    value, next_value = values_of(state, rollout)
    flags = rollout.terminated, rollout.truncated
    advantage = gae(rollout.reward / 4, value, next_value, *flags, discount=config.gamma, gae_lambda=config.gae_lambda)
    old, new = (distribution(one.acting, rollout.obs) for one in (state, after))
    moved, _ = step(config, state.acting, rollout, old, (advantage - jnp.mean(advantage)) / jnp.std(advantage))
    np.testing.assert_allclose(flat(after.acting), flat(moved), rtol=1e-4, atol=1e-6)
    targets = ValueTargets(normalise(state.acting.normaliser, rollout.obs), None, advantage + value, rollout.valid)
    fit = jax.jit(partial(fit_critic, config))
    critic, moments, fitting = fit(state.critic, state.critic_optimiser, targets, jax.random.key(0))
    np.testing.assert_allclose(ravel_pytree(after.critic)[0], ravel_pytree(critic)[0], rtol=1e-6)
    np.testing.assert_allclose(ravel_pytree(after.critic_optimiser)[0], ravel_pytree(moments)[0], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(metrics["value_loss"], fitting["value_loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["explained_variance"], 1 - jnp.var(advantage) / jnp.var(advantage + value), rtol=1e-6)
    normaliser = state.acting.normaliser.update(rollout.obs, rollout.valid)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), after.acting.normaliser, normaliser)
    for name, expected in step_audit(old, new, rollout, 4 * advantage, discount=config.gamma).items():
        np.testing.assert_allclose(metrics[name], expected, rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(metrics["constrained_kl"], kl_between(state.acting, moved, rollout), rtol=1e-3)
    assert metrics["kl"] != pytest.approx(float(metrics["constrained_kl"]), rel=0.01)  # which the statistics have no part in


def test_what_the_critic_learns_does_not_reach_the_policy():
    rollout = experience(spec_for("discrete"), (3, 1, 5, 2, 4, 9))
    configs = Small(), Small(critic_learning_rate=0.3, critic_epochs=5)
    afters = [update(config, first_state(config, "discrete"), rollout)[0] for config in configs]
    jax.tree.map(np.testing.assert_array_equal, afters[0].acting, afters[1].acting)
    weights = [ravel_pytree(after.critic)[0] for after in afters]
    assert np.max(np.abs(weights[0] - weights[1])) > 0.1


@KINDS
def test_rows_of_a_reset_do_not_matter(kind):
    config, rollout = Small(), experience(spec_for(kind), (3, 1, 5, 2, 4), seed=3)
    plain, with_rows = batches_of(rollout, 24)[0], batches_of(with_reset_rows(rollout), 24)[0]
    assert len(plain.time) == len(with_rows.time)
    (after, metrics), (other, same) = (update(config, first_state(config, kind), batch) for batch in (plain, with_rows))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9), after.acting, other.acting)
    for name in ("kl", "constrained_kl", "ratio_max", "predicted_improvement", "explained_variance", "step_scale"):
        np.testing.assert_allclose(metrics[name], same[name], rtol=1e-6, err_msg=name)
    short, _ = update(config, first_state(config, kind), batches_of(experience(spec_for(kind), (3, 1, 5, 2, 4), seed=4), 24)[0])
    assert np.max(np.abs(flat(short.acting) - flat(after.acting))) > 1e-4


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("gamma", (0.0, 1.0), (-0.01, 1.01)),
        ("gae_lambda", (0.0, 1.0), (-0.01, 1.01)),
        ("max_kl", (1e-9,), (0.0,)),
        ("cg_iterations", (1,), (0,)),
        ("cg_damping", (0.0,), (-0.1,)),
        ("fisher_fraction", (0.01, 1.0), (0.0, 1.01)),
        ("backtrack_factor", (0.5,), (0.0, 1.0)),
        ("backtrack_tries", (1,), (0,)),
        ("num_steps", (1,), (0,)),
        ("critic_epochs", (1,), (0,)),
        ("minibatch_size", (1,), (0,)),
        ("critic_learning_rate", (1e-9,), (0.0,)),
    ],
)
def test_bounds(name, inside, outside):
    for value in inside:
        TRPO(**{name: value})
    for value in outside:
        with pytest.raises(ValueError, match=rf"^TRPO\.{name} must lie in"):
            TRPO(**{name: value})


def test_a_minibatch_that_does_not_divide_the_batch_is_refused():
    with pytest.raises(ValueError, match="minibatch_size=64 does not divide the batch of 8 steps x 2 environments = 16"):
        trpo.init(TRPO(num_steps=8), spec_for("discrete"), jax.random.key(0))
