"""PPO: its gradient summed over every trajectory of the oracle, its loss in loops, and what each setting does to an update."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from batches import (
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
from jax.flatten_util import ravel_pytree
from oracle import TOLERANCE

from surefoot.algorithms import ppo
from surefoot.algorithms.ppo import PPO, Batch, loss
from surefoot.audit import step_audit
from surefoot.distributions import Categorical
from surefoot.math.returns import gae, time_discount
from surefoot.minibatches import clipped_adam
from surefoot.policies import StochasticPolicy, distributions_of

pytestmark = pytest.mark.usefixtures("x64")

MDP = oracle.random_mdp(0)
UNDISCOUNTED = oracle.random_mdp(0, discount=1.0)
BATCH = oracle.trajectories(MDP)
FROZEN = 1e-300  # a learning rate that leaves every parameter as it is
Plain = partial(PPO, normalise_advantage=False, normalise_reward=False, normalise_observation=False, max_grad_norm=np.inf)


# The gradient on the oracle


def test_gradient_at_the_old_policy_is_the_policy_gradient():
    theta = oracle.random_logits(MDP, 1)
    log_prob = oracle.log_prob(theta, BATCH)
    advantage = time_discount(BATCH.time, discount=MDP.discount) * oracle.row_advantages(MDP, theta, BATCH)
    zeros = np.zeros(BATCH.time.shape)
    every = Batch(inputs(oracle_rollout(MDP, BATCH).obs), BATCH.action, log_prob, zeros, advantage, zeros, BATCH.valid)
    critic = ValueTable(jnp.zeros(4 * 3))

    def ascent(batch):  # the loss is a mean over rows
        batch = jax.tree.map(lambda x: x[:, None], batch)
        return -jnp.sum(batch.valid) * jax.grad(lambda theta: loss((Table(theta), critic), batch, 0.2, Plain())[0])(theta).ravel()

    estimates = oracle.compiled(jax.vmap(ascent, in_axes=1), jax.tree.map(jnp.asarray, every))
    np.testing.assert_allclose(oracle.probability(theta, BATCH) @ estimates, oracle.objective_gradient(MDP, theta), **TOLERANCE)


@pytest.mark.parametrize(("mdp", "settings"), [(UNDISCOUNTED, {}), (MDP, {"state_discount": True})], ids=["undiscounted", "discounted"])
def test_an_update_follows_the_policy_gradient(mdp, settings):
    """With exact values, every generalised advantage estimate is unbiased; rows after an episode's end do not count."""
    theta = oracle.random_logits(MDP, 1)
    value = oracle.values(mdp, theta)[0]
    config = Plain(gamma=mdp.discount, gae_lambda=0.7, epochs=1, num_steps=3, minibatch_size=3, learning_rate=FROZEN, **settings)
    state = first_state(config, theta, value.ravel(), table_spec(value.size, 2, 1))
    every = oracle_rollout(mdp, BATCH)

    def ascent(rows):
        rollout = every._replace(**jax.tree.map(lambda x: x[:, None], rows), last_obs=rows["final_obs"][-1:])
        after, _ = ppo.update(config, state, rollout, None, jax.random.key(0))
        return -10.0 * jnp.sum(rows["valid"]) * after.optimiser[1].mu[: theta.size]

    estimates = oracle.compiled(jax.vmap(ascent, in_axes=1), {name: jnp.asarray(getattr(every, name)) for name in PER_ROW})
    mean = oracle.probability(theta, BATCH) @ estimates
    np.testing.assert_allclose(mean, oracle.objective_gradient(mdp, theta), **TOLERANCE)


# The loss against a loop over rows

ROWS = 8
SPEC = table_spec(num_observations=5, num_actions=3, num_envs=2)


def minibatch():
    """Rows whose ratios lie between a tenth and ten; the last three do not count."""
    rng = np.random.default_rng(0)
    params = Table(jnp.asarray(rng.normal(size=(5, 3)))), ValueTable(jnp.asarray(rng.normal(size=5)))
    obs, action = rng.integers(5, size=40), rng.integers(3, size=40)
    new = distribution(StochasticPolicy(params[0], None), obs[None]).log_prob(action[None])[0]
    old_value, advantage, value_target = rng.normal(size=(3, 40))
    rows = Batch(inputs(obs), action, new + rng.normal(size=40), old_value, advantage, value_target, np.arange(40) < 37)
    return params, jax.tree.map(lambda x: x[None], rows)


def loss_by_definition(params, batch, config, clip=0.2):
    log_probs, values = np.asarray(jax.nn.log_softmax(params[0].logits)), np.asarray(params[1].values)
    batch = jax.tree.map(lambda x: x[0], batch)
    obs = batch.inputs.obs
    advantage, sums = batch.advantage[:37], {"policy": 0.0, "value": 0.0, "entropy": 0.0}
    if config.normalise_advantage:
        advantage = (advantage - advantage.mean()) / advantage.std()
    for row, a in enumerate(advantage):
        ratio = np.exp(log_probs[obs[row], batch.action[row]] - batch.old_log_prob[row])
        objective = min(ratio * a, min(max(ratio, 1 - clip), 1 + clip) * a)
        if config.dual_clip is not None and a < 0:
            objective = max(objective, config.dual_clip * a)
        value, old, target = values[obs[row]], batch.old_value[row], batch.value_target[row]
        error = (value - target) ** 2
        if config.clip_value is not None:
            error = max(error, (old + np.clip(value - old, -config.clip_value, config.clip_value) - target) ** 2)
        sums["policy"] -= objective
        sums["value"] += error / 2
        sums["entropy"] -= np.sum(np.exp(log_probs[obs[row]]) * log_probs[obs[row]])
    return (sums["policy"] + config.value_coef * sums["value"] - config.entropy_coef * sums["entropy"]) / 37


@pytest.mark.parametrize(
    "settings", [{}, {"normalise_advantage": True}, {"dual_clip": 1.5}, {"value_coef": 2.0}, {"entropy_coef": 0.3}, {"clip_value": 0.1}]
)
def test_loss_by_definition(settings):
    params, batch = minibatch()
    value, metrics = loss(params, batch, 0.2, Plain(**settings))
    np.testing.assert_allclose(value, loss_by_definition(params, batch, Plain(**settings)), rtol=1e-7)
    if settings and "value_coef" not in settings:
        assert abs(value - loss_by_definition(params, batch, Plain())) > 1e-3
    ratio = np.exp(distributions_of(params[0], batch.inputs).log_prob(batch.action) - batch.old_log_prob)[0, :37]
    np.testing.assert_allclose(metrics["clip_fraction"], np.mean(np.abs(ratio - 1) > 0.2), **TOLERANCE)
    np.testing.assert_allclose(metrics["approximate_kl"], np.mean(ratio - 1 - np.log(ratio)), **TOLERANCE)


def test_without_a_bound_on_its_change_the_value_has_a_plain_squared_loss():
    params, batch = minibatch()

    def plain(critic):
        return jnp.mean(0.5 * (critic.values[batch.inputs.obs[0, :37]] - batch.value_target[0, :37]) ** 2)

    value, gradient = jax.value_and_grad(lambda critic: loss((params[0], critic), batch, 0.2, Plain())[1]["value_loss"])(params[1])
    expected, slope = jax.value_and_grad(plain)(params[1])
    np.testing.assert_allclose(value, expected, rtol=1e-14)
    np.testing.assert_allclose(gradient.values, slope.values, rtol=1e-13)


def test_actor_and_critic_have_their_gradients_apart():
    params, batch = minibatch()
    by_policy, by_value = (
        jax.grad(lambda params, name: loss(params, batch, 0.2, Plain())[1][name])(params, name) for name in ("policy_loss", "value_loss")
    )
    assert np.all(by_policy[1].values == 0)
    assert np.all(by_value[0].logits == 0)
    assert np.any(by_policy[0].logits != 0)


# Whole updates, on batches of 8 rows of 2 environments

Whole = partial(Plain, num_steps=ROWS, minibatch_size=16, epochs=3, learning_rate=0.1)

update = jax.jit(lambda config, state, rollout: ppo.update(config, state, rollout, None, jax.random.key(0)), static_argnums=0)


def first_state(config, logits=None, values=None, spec=SPEC):
    rng, size = np.random.default_rng(5), spec.observation_space.n
    actor = Table(jnp.asarray(rng.normal(size=(size, spec.action_space.n)) if logits is None else logits))
    critic = ValueTable(jnp.asarray(rng.normal(size=size) if values is None else values))
    optimiser = clipped_adam(config).init(ravel_pytree((actor, critic))[0])
    return ppo.init(config, spec, jax.random.key(0))._replace(acting=StochasticPolicy(actor, None), critic=critic, optimiser=optimiser)


def parameters(state):
    return np.asarray(ravel_pytree((state.acting.actor, state.critic))[0])


def test_rows_of_a_reset_do_not_matter():
    """In one minibatch; in more, they change who shares one with whom."""
    config, rollout = Whole(normalise_advantage=True), experience(SPEC, (3, 1), seed=3)
    plain, with_rows = (update(config, first_state(config), batches_of(stream, ROWS)[0]) for stream in (rollout, with_reset_rows(rollout)))
    np.testing.assert_allclose(parameters(with_rows[0]), parameters(plain[0]), **TOLERANCE)
    for name in plain[1]:
        np.testing.assert_allclose(with_rows[1][name], plain[1][name], **TOLERANCE, err_msg=name)
    assert np.max(np.abs(parameters(plain[0]) - parameters(first_state(config)))) > 0.1


def test_epochs_end_once_one_of_them_was_half_as_far_again_as_its_target():
    rollout = experience(SPEC, (5, 3))
    after, metrics = update(Whole(epochs=2), first_state(Whole()), rollout)
    kl = float(metrics["approximate_kl"])
    assert kl > 1e-3
    for target_kl, epochs in ((None, 3), (0.99 * kl / 1.5, 2), (1.01 * kl / 1.5, 3)):
        config = Whole(target_kl=target_kl)
        after, metrics = update(config, first_state(config), rollout)
        assert metrics["epochs"] == after.optimiser[1].count == epochs


def test_schedules_follow_the_progress_of_the_run():
    """Each its own: halfway, the one's clip and the other's step size have fallen to where they stay for the other."""
    clip, rate = Whole(clip=0.4, clip_schedule="linear"), Whole(learning_rate=0.2, learning_rate_schedule="linear")
    state, rollout, moved = first_state(clip), experience(SPEC, (5, 3)), {}
    for progress, rest in ((0.0, 1.0), (0.5, 0.5), (1.0, 0.0)):
        for config, expected in ((clip, (0.4 * rest, 0.1)), (rate, (0.2, 0.2 * rest))):
            after, metrics = update(config, state, rollout._replace(progress=np.float32(progress)))
            np.testing.assert_allclose([metrics["clip"], metrics["learning_rate"]], expected, rtol=1e-7)
            moved[config, progress] = parameters(after)
    np.testing.assert_allclose(moved[clip, 0.5], moved[rate, 0.5], rtol=1e-6)
    np.testing.assert_array_equal(moved[rate, 1.0], parameters(state))
    assert np.max(np.abs(moved[clip, 0.0] - moved[clip, 0.5])) > 0.01
    assert np.max(np.abs(moved[rate, 0.0] - moved[rate, 0.5])) > 0.01


def test_every_epoch_descends_the_loss_with_what_was_true_before_the_first():
    """Old probabilities and values, advantages and targets are those of the policy and the critic that acted."""
    config = Whole(clip_value=0.05)
    state, rollout = first_state(config), experience(SPEC, (5, 3))
    value, next_value = values_of(state, rollout)
    decays = {"discount": config.gamma, "gae_lambda": config.gae_lambda}
    advantage = gae(rollout.reward, value, next_value, rollout.terminated, rollout.truncated, **decays)
    old_log_prob = distribution(state.acting, rollout.obs).log_prob(rollout.action)
    batch = Batch(inputs(rollout.obs), rollout.action, old_log_prob, value, advantage, advantage + value, rollout.valid)
    (flat, unravel), moments = ravel_pytree((state.acting.actor, state.critic)), state.optimiser
    slope = jax.jit(jax.grad(lambda flat: loss(unravel(flat), batch, config.clip, config)[0]))
    for _ in range(config.epochs):
        direction, moments = clipped_adam(config).update(slope(flat), moments)
        flat = flat - config.learning_rate * direction
    np.testing.assert_allclose(parameters(update(config, state, rollout)[0]), flat, **TOLERANCE)


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


def test_a_policy_that_did_not_move_went_no_distance():
    config = Whole(learning_rate=FROZEN)
    after, metrics = update(config, first_state(config), experience(SPEC, (5, 3)))
    np.testing.assert_array_equal(parameters(after), parameters(first_state(config)))
    expected = {"kl": 0, "ratio_min": 1, "ratio_max": 1, "effective_sample_size": 1, "predicted_improvement": 0, "clip_fraction": 0}
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, **TOLERANCE, err_msg=name)


def test_the_audit_is_of_the_whole_step_in_units_of_reward():
    config = Whole(normalise_reward=True, gamma=0.9, gae_lambda=0.8)
    state, rollout = first_state(config), experience(SPEC, (2, 3, 3))
    scale = state.return_scale
    state = state._replace(return_scale=scale._replace(moments=scale.moments._replace(variance=jnp.asarray(16.0))))
    after, metrics = update(config, state, rollout)
    flags = rollout.terminated, rollout.truncated
    advantage = 4.0 * gae(
        rollout.reward / 4.0,
        *values_of(state, rollout),
        *flags,
        discount=0.9,
        gae_lambda=0.8,
    )
    old, new = (Categorical(jax.nn.log_softmax(one.acting.actor.logits)[rollout.obs]) for one in (state, after))
    audit = step_audit(old, new, rollout, advantage, discount=0.9)
    for name, value in audit.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-7, err_msg=name)
    assert metrics["kl"] > 0.01
    assert after.return_scale.moments.count == 16


def test_a_minibatch_that_does_not_divide_the_batch_is_refused():
    with pytest.raises(ValueError, match="minibatch_size=64 does not divide the batch of 8 steps x 2 environments = 16"):
        ppo.init(PPO(num_steps=8), SPEC, jax.random.key(0))
