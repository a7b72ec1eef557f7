"""REINFORCE: its gradient summed over every trajectory of the oracle, and what batches do to episodes."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from batches import PER_ROW, Table, ValueTable, batches_of, distribution, experience, oracle_rollout, part, table_spec, with_reset_rows
from oracle import TOLERANCE

from surefoot.algorithms import reinforce
from surefoot.algorithms.reinforce import REINFORCE, baselines, credits, loss
from surefoot.critics import critic_optimiser
from surefoot.math.policy_gradient import score_function_loss, step_importance_weight, trajectory_importance_weight
from surefoot.math.returns import reward_to_go, time_discount
from surefoot.policies import StochasticPolicy
from surefoot.waiting import rows_of

pytestmark = pytest.mark.usefixtures("x64")

MDP = oracle.random_mdp(0)
BATCH = oracle.trajectories(MDP)
EACH = np.arange(BATCH.valid.shape[1])[:, None]  # batches of one trajectory
SMALL = oracle.random_mdp(1, horizon=2)  # 52 trajectories of one step or two
SMALL_BATCH = oracle.trajectories(SMALL)
OTHER_MEAN = 1.7  # of some earlier batch

Plain = partial(REINFORCE, gamma=MDP.discount, normalise_advantage=False, normalise_reward=False, normalise_observation=False)


@partial(jax.jit, static_argnums=(0, 1, 2))
def gradients(config, mdp, batch_name, theta, behaviour, index):
    """[B, D] what `loss` makes of each batch of trajectories, `index` [B, n] of their numbers, as ascent."""
    batch = {"BATCH": BATCH, "SMALL_BATCH": SMALL_BATCH}[batch_name]
    value = oracle.row_values(oracle.values(mdp, theta)[0], batch)[0]
    every_row = rows_of(oracle_rollout(mdp, batch), jnp.asarray(batch.reward), oracle.log_prob(behaviour, batch), value)

    def one(index):
        rows = jax.tree.map(lambda x: jnp.asarray(x)[:, index], every_row)
        baseline = baselines(config, OTHER_MEAN, rows, credits(config, rows, rows.reward), rows.valid)
        return jax.grad(lambda theta: -loss(config, StochasticPolicy(Table(theta), None), rows, baseline, rows.valid))(theta).ravel()

    return jax.vmap(one)(index)


def moments(config, theta, behaviour):
    """Mean [D] and variance of the gradient of one trajectory."""
    estimates = gradients(config, MDP, "BATCH", theta, behaviour, EACH)
    return oracle.moments(oracle.probability(behaviour, BATCH), estimates)


def moments_of_pairs(config, theta, behaviour):
    """Mean [D] and variance of the gradient of a batch of two."""
    index, prob = oracle.independent_draws(oracle.probability(behaviour, SMALL_BATCH), 2)
    return oracle.moments(prob, gradients(config, SMALL, "SMALL_BATCH", theta, behaviour, index))


def policies(mdp=MDP):
    """The policy to learn about, and another that acts."""
    return oracle.random_logits(mdp, 1), oracle.random_logits(mdp, 2)


def gap(mean, exact):
    """How far off the mean is, as a part of the exact gradient."""
    return np.max(np.abs(mean - exact)) / np.max(np.abs(exact))


CREDITS = {
    "total return": {"credit": "total"},
    "reward to go": {"discounting": "objective"},
}


@pytest.mark.parametrize("baseline", ["none", "mean", "value"])
@pytest.mark.parametrize("credit", CREDITS)
def test_expected_gradient_is_that_of_the_objective(credit, baseline):
    theta, _ = policies()
    mean, _ = moments(Plain(**CREDITS[credit], baseline=baseline), theta, theta)
    np.testing.assert_allclose(mean, oracle.objective_gradient(MDP, theta), **TOLERANCE)


@pytest.mark.parametrize("credit", CREDITS)
def test_credit_of_the_other_episodes_is_an_unbiased_baseline_and_lowers_the_variance(credit):
    theta, _ = policies(SMALL)
    mean, variance = moments_of_pairs(Plain(**CREDITS[credit], baseline="leave_one_out"), theta, theta)
    np.testing.assert_allclose(mean, oracle.objective_gradient(SMALL, theta), **TOLERANCE)
    assert variance < moments_of_pairs(Plain(**CREDITS[credit], baseline="none"), theta, theta)[1]


def test_customary_discounting_is_biased():
    theta, _ = policies()
    mean, _ = moments(Plain(discounting="reward_to_go", baseline="none"), theta, theta)
    assert gap(mean, oracle.objective_gradient(MDP, theta)) > 0.03


def test_variance_falls_from_total_return_to_reward_to_go_to_learned_value():
    theta, _ = policies()
    ladder = [CREDITS["total return"] | {"baseline": "none"}, CREDITS["reward to go"] | {"baseline": "none"}, CREDITS["reward to go"]]
    variances = [float(moments(Plain(**rung), theta, theta)[1]) for rung in ladder]
    assert all(below < above for above, below in pairwise(variances)), variances


OFF_POLICY = [("total return", "trajectory"), ("reward to go", "trajectory"), ("reward to go", "per_step")]


@pytest.mark.parametrize("baseline", ["mean", "value"])
@pytest.mark.parametrize(("credit", "importance"), OFF_POLICY)
def test_weighted_gradient_of_what_another_policy_did_is_unbiased(credit, importance, baseline):
    theta, behaviour = policies()
    mean, _ = moments(Plain(**CREDITS[credit], baseline=baseline, importance=importance), theta, behaviour)
    np.testing.assert_allclose(mean, oracle.objective_gradient(MDP, theta), **TOLERANCE)


@pytest.mark.parametrize(("credit", "importance"), OFF_POLICY)
def test_weighted_gradient_less_the_credit_of_other_episodes_is_unbiased(credit, importance):
    theta, behaviour = policies(SMALL)
    mean, _ = moments_of_pairs(Plain(**CREDITS[credit], baseline="leave_one_out", importance=importance), theta, behaviour)
    np.testing.assert_allclose(mean, oracle.objective_gradient(SMALL, theta), **TOLERANCE)


def test_unweighted_gradient_of_what_another_policy_did_is_biased():
    theta, behaviour = policies()
    mean, _ = moments(Plain(discounting="objective"), theta, behaviour)
    assert gap(mean, oracle.objective_gradient(MDP, theta)) > 0.1


def test_weights_per_step_vary_less_than_weights_of_whole_episodes():
    theta, behaviour = policies()
    per_step, trajectory = (
        moments(Plain(discounting="objective", baseline="none", importance=importance), theta, behaviour)[1]
        for importance in ("per_step", "trajectory")
    )
    assert per_step < trajectory


@pytest.mark.parametrize("importance", ["trajectory", "per_step"])
def test_self_normalised_weights_are_biased(importance):
    theta, behaviour = policies(SMALL)
    config = Plain(discounting="objective", baseline="none", importance=importance, self_normalised=True)
    assert gap(moments_of_pairs(config, theta, behaviour)[0], oracle.objective_gradient(SMALL, theta)) > 0.01


@pytest.mark.parametrize("importance", ["trajectory", "per_step"])
def test_self_normalised_weights_are_consistent(importance):
    """In a batch that holds every trajectory as often as it is likely, as one of infinitely many does, the bias is gone."""
    theta, _ = policies()
    config = Plain(discounting="objective", baseline="none", importance=importance, self_normalised=True)
    coin = oracle.MDP(np.full((2, 2, 2), 0.5), SMALL.reward[:2, :2, :2], np.full(2, 0.5), np.zeros(2, bool), 2, MDP.discount)
    batch, theta = oracle.trajectories(coin), theta[:2]
    uniform = jnp.zeros_like(theta)
    prob = oracle.probability(uniform, batch)
    np.testing.assert_allclose(prob, 1 / len(prob), **TOLERANCE)
    rows = rows_of(oracle_rollout(coin, batch), jnp.asarray(batch.reward), oracle.log_prob(uniform, batch), jnp.zeros(batch.time.shape))

    def objective(theta):
        return -loss(config, StochasticPolicy(Table(theta), None), rows, jnp.zeros(rows.time.shape), rows.valid)

    np.testing.assert_allclose(oracle.compiled(jax.grad(objective), theta).ravel(), oracle.objective_gradient(coin, theta), **TOLERANCE)


@pytest.mark.parametrize("importance", ["trajectory", "per_step"])
def test_weights_are_held_below_their_maximum(importance):
    theta, behaviour = policies()
    flags = BATCH.terminated, BATCH.truncated
    weigh = trajectory_importance_weight if importance == "trajectory" else step_importance_weight
    weight = np.minimum(weigh(oracle.log_prob(theta, BATCH), oracle.log_prob(behaviour, BATCH), *flags), 0.8)

    def to_go(reward):
        return reward_to_go(reward, jnp.zeros_like(reward), *flags, discount=MDP.discount)

    credit = weight * to_go(BATCH.reward) if importance == "trajectory" else to_go(weight * BATCH.reward)
    advantage = time_discount(BATCH.time, discount=MDP.discount) * credit
    expected = oracle.gradient_estimates(lambda theta: score_function_loss(oracle.log_prob(theta, BATCH), advantage), theta, BATCH.valid)
    config = Plain(discounting="objective", baseline="none", importance=importance, max_weight=0.8)
    np.testing.assert_allclose(gradients(config, MDP, "BATCH", theta, behaviour, EACH), expected, **TOLERANCE)


@pytest.mark.parametrize("baseline", ["none", "value"])
def test_normalised_advantages_only_rescale_the_gradient(baseline):
    theta, _ = policies(SMALL)
    index = oracle.independent_draws(oracle.probability(theta, SMALL_BATCH), 2)[0]
    plain = gradients(Plain(baseline=baseline), SMALL, "SMALL_BATCH", theta, theta, index)
    normalised = gradients(Plain(baseline=baseline, normalise_advantage=True), SMALL, "SMALL_BATCH", theta, theta, index)
    length, other = (np.linalg.norm(g, axis=-1, keepdims=True) for g in (plain, normalised))
    np.testing.assert_allclose(normalised / other, plain / length, rtol=1e-6, atol=1e-6)
    assert np.ptp(other / length) > 0.1
    assert np.max(other) < 10.0  # also where all advantages are alike


# Whole updates, on batches of 8 rows of 2 environments. Adam's first moment, begun anew, is a tenth of the gradient.

SPEC = table_spec(num_observations=5, num_actions=2, num_envs=2)
ROWS = 8
FROZEN = 1e-300  # a learning rate that leaves every parameter as it is
Still = partial(Plain, learning_rate=FROZEN, critic_learning_rate=FROZEN, num_steps=ROWS, window=30, critic_epochs=1, minibatch_size=16)

update = jax.jit(lambda config, state, rollout: reinforce.update(config, state, rollout, None, jax.random.key(0)), static_argnums=0)


def first_state(config, logits=None, values=None, spec=SPEC):
    rng, size = np.random.default_rng(5), spec.observation_space.n
    logits = jnp.asarray(rng.normal(size=(size, spec.action_space.n)) if logits is None else logits)
    values = jnp.asarray(rng.normal(size=size) if values is None else values)
    return reinforce.init(config, spec, jax.random.key(0))._replace(
        acting=StochasticPolicy(Table(logits), None),
        critic=ValueTable(values),
        optimiser=optax.adam(config.learning_rate).init(Table(logits)),
        critic_optimiser=critic_optimiser(config, ValueTable(values)),
    )


def ascent(state):
    return -10.0 * state.optimiser[0].mu.logits


def learn(config, batches, state=None):
    """The sum over all episodes of their gradients; how many were used; the last state."""
    state = first_state(config) if state is None else state
    fresh, total, episodes = first_state(config).optimiser, 0.0, 0
    for batch in batches:
        state, metrics = update(config, state._replace(optimiser=fresh), batch)
        total += ascent(state) * int(metrics["episodes_used"])
        episodes += int(metrics["episodes_used"])
    return total, episodes, state


def by_definition(rollout, state, *, baseline, cut_value):
    """Sum over episodes of sum_t (G_t - baseline(s_t)) grad log pi(a_t|s_t), in loops; `cut_value` of what a truncation cut off."""
    probs = np.asarray(jax.nn.softmax(state.acting.actor.logits))
    total = np.zeros(probs.shape)
    for n in range(rollout.time.shape[1]):
        rows = []
        for t in range(len(rollout.time)):
            rows.append(t)
            if not (rollout.terminated[t, n] or rollout.truncated[t, n]):
                continue
            credit = cut_value[rollout.final_obs[t, n]] if rollout.truncated[t, n] else 0.0
            for row in reversed(rows):
                obs = rollout.obs[row, n]
                credit = rollout.reward[row, n] + MDP.discount * credit
                score = -probs[obs]
                score[rollout.action[row, n]] += 1
                total[obs] += (credit - baseline[obs]) * score
            rows = []
    return total


@pytest.mark.parametrize("offset", [0, 3, 6])
@pytest.mark.parametrize("has_reset_rows", [False, True])
@pytest.mark.parametrize("baseline", ["none", "value"])
def test_every_episode_counts_once_wherever_batches_cut_it(baseline, has_reset_rows, offset):
    """A learned value, and nothing else, stands for what a time limit cut off."""
    rollout = experience(SPEC, (3, 1, 5, 2, 4, 1, 14, 6, 2), seed=3)
    stream = with_reset_rows(rollout) if has_reset_rows else rollout
    total, episodes, state = learn(Still(baseline=baseline), batches_of(stream, ROWS, offset))
    assert episodes == 18
    assert min(rollout.truncated.sum(), rollout.terminated.sum()) > 4
    value = np.asarray(state.critic.values) if baseline == "value" else np.zeros(5)
    np.testing.assert_allclose(total, by_definition(rollout, state, baseline=value, cut_value=value), **TOLERANCE)


def test_rows_of_a_reset_do_not_matter_to_what_depends_on_the_whole_batch():
    importance = {"importance": "trajectory", "self_normalised": True}
    config = Still(credit="total", baseline="leave_one_out", normalise_advantage=True, **importance)
    rollout = experience(SPEC, (3, 1), seed=3)
    plain, without, with_rows = (
        learn(config, batches_of(stream, ROWS))[0] for stream in (rollout, experience(SPEC, (3, 1, 2, 2)), with_reset_rows(rollout))
    )
    np.testing.assert_allclose(with_rows, plain, **TOLERANCE)
    assert np.max(np.abs(with_rows - without)) > 0.1


def test_episodes_longer_than_window_and_batch_together_are_left_out():
    rollout = experience(SPEC, (11, 12, 3, 14, 2, 20), seed=1)
    _, episodes, _ = learn(Still(baseline="none", window=4), batches_of(rollout, ROWS))
    fits = [rollout.time[t, n] + 1 <= 4 + t % ROWS + 1 for t, n in np.argwhere(rollout.terminated | rollout.truncated)]
    assert episodes == sum(fits)
    assert 4 <= sum(fits) <= 8


def test_where_no_episode_has_ended_the_policy_keeps_its_bits():
    config = Plain(importance="per_step", self_normalised=True, num_steps=ROWS, minibatch_size=16, window=30, critic_epochs=1)
    state, _ = update(config, first_state(config), experience(SPEC, (5, 3)))
    after, metrics = update(config, state, experience(SPEC, (), unfinished=ROWS))
    jax.tree.map(np.testing.assert_array_equal, (after.acting, after.optimiser), (state.acting, state.optimiser))
    assert metrics["episodes_used"] == metrics["policy_loss"] == metrics["gradient_norm"] == 0
    assert np.any(state.optimiser[0].mu.logits != 0)  # momentum
    assert np.any(after.critic.values != state.critic.values)  # which learns from every row


def test_an_episode_that_its_environment_forgot_is_left_out():
    """As after a resume of an environment that cannot continue where it was."""
    config = Still(baseline="none")
    _, _, state = learn(config, [experience(SPEC, (2,), unfinished=6)])
    later = experience(SPEC, (5, 3), seed=9)
    total, episodes, _ = learn(config, [later], state)
    assert episodes == 4
    np.testing.assert_allclose(total, by_definition(later, state, baseline=np.zeros(5), cut_value=np.zeros(5)), **TOLERANCE)


def test_the_mean_baseline_is_that_of_the_batches_before():
    config = Still(baseline="mean")
    first, second, third = (experience(SPEC, lengths, seed=seed) for seed, lengths in enumerate([(3, 1, 4), (2, 5, 1), (8,)]))
    _, _, state = learn(config, [first, second])
    every_credit = [
        reward_to_go(batch.reward, np.zeros((ROWS, 2)), batch.terminated, batch.truncated, discount=MDP.discount)
        for batch in (first, second)
    ]
    np.testing.assert_allclose(state.mean_credit.mean, np.mean(every_credit), rtol=1e-6)
    total, _, _ = learn(config, [third], state)
    expected = by_definition(third, state, baseline=np.full(5, state.mean_credit.mean), cut_value=np.zeros(5))
    np.testing.assert_allclose(total, expected, **TOLERANCE)


def test_a_learned_value_is_an_unbiased_baseline_of_an_episode_that_batches_cut():
    """The critic is fitted to the first half of an episode before the second half arrives: the first half keeps its older values."""
    theta, num_observations = oracle.random_logits(SMALL, 1), 3 * len(SMALL.start)
    spec = table_spec(num_observations, num_actions=2, num_envs=1)
    config = Still(discounting="objective", num_steps=1, window=1, minibatch_size=1, critic_learning_rate=0.5)
    start = first_state(config, theta, spec=spec)
    every = oracle_rollout(SMALL, SMALL_BATCH)

    def halves(rows):
        rollout = every._replace(**jax.tree.map(lambda x: x[:, None], rows), last_obs=rows["final_obs"][-1:])
        first, metrics = reinforce.update(config, start, part(rollout, 0, 1), None, jax.random.key(0))
        second, more = reinforce.update(config, first._replace(optimiser=start.optimiser), part(rollout, 1, 2), None, jax.random.key(0))
        return ascent(first) + ascent(second), metrics["episodes_used"] + more["episodes_used"], first.critic.values

    rows = {name: jnp.asarray(getattr(every, name)) for name in PER_ROW}
    estimates, episodes, fitted = oracle.compiled(jax.vmap(halves, in_axes=1), rows)
    np.testing.assert_array_equal(episodes, 1)
    assert np.all(np.max(np.abs(fitted - start.critic.values), axis=-1) > 0.1)
    prob = oracle.probability(theta, SMALL_BATCH)
    np.testing.assert_allclose(prob @ estimates.reshape(len(prob), -1), oracle.objective_gradient(SMALL, theta), **TOLERANCE)


def test_each_further_epoch_weighs_by_how_far_the_policy_has_moved():
    config = Plain(importance="per_step", baseline="value", epochs=3, learning_rate=0.1, num_steps=ROWS, minibatch_size=16, window=0)
    state, rollout = first_state(config), experience(SPEC, (1, 4, 3))
    after, metrics = update(config, state, rollout)

    table, values = state.acting.actor, np.asarray(state.critic.values)
    following = np.where(rollout.truncated, MDP.discount * values[rollout.final_obs], 0.0)
    old_log_prob = distribution(state.acting, rollout.obs).log_prob(rollout.action)
    rows = rows_of(rollout, rollout.reward + following, old_log_prob, jnp.asarray(values[rollout.obs]))
    moments = state.optimiser
    for _ in range(3):
        value, gradient = jax.value_and_grad(lambda table: loss(config, StochasticPolicy(table, None), rows, rows.value, rows.valid))(table)
        change, moments = optax.adam(0.1).update(gradient, moments)
        table = optax.apply_updates(table, change)
    np.testing.assert_allclose(after.acting.actor.logits, table.logits, **TOLERANCE)
    np.testing.assert_allclose(metrics["policy_loss"], value, **TOLERANCE)
    np.testing.assert_allclose(metrics["gradient_norm"], np.linalg.norm(gradient.logits), **TOLERANCE)
    assert metrics["kl"] > 0.01


def test_the_critic_learns_from_every_row_what_the_batch_shows_of_its_return():
    config = Still(baseline="value")
    state, rollout = first_state(config), experience(SPEC, (2, 3), unfinished=3, seed=2)
    after, _ = update(config, state, rollout)
    values, gradient = np.asarray(state.critic.values), np.zeros(5)
    for n in range(2):
        for t in reversed(range(ROWS)):
            if t == ROWS - 1 or rollout.truncated[t, n]:
                target = values[rollout.last_obs[n] if t == ROWS - 1 else rollout.final_obs[t, n]]
            elif rollout.terminated[t, n]:
                target = 0.0
            target = rollout.reward[t, n] + MDP.discount * target
            gradient[rollout.obs[t, n]] += (values[rollout.obs[t, n]] - target) / (2 * ROWS)
    np.testing.assert_allclose(10 * after.critic_optimiser[0].mu, gradient, **TOLERANCE)


def test_rewards_are_divided_by_the_scale_of_returns():
    config, rollout = Still(baseline="none", normalise_reward=True), experience(SPEC, (1, 4, 3))
    state = first_state(config)
    (unscaled, _, _), (scaled, _, _) = (
        learn(
            config, [rollout], state._replace(return_scale=scale._replace(moments=scale.moments._replace(variance=jnp.asarray(variance))))
        )
        for scale, variance in ((state.return_scale, 1.0), (state.return_scale, 16.0))
    )
    np.testing.assert_allclose(scaled, unscaled / 4, rtol=1e-7)
    assert np.max(np.abs(unscaled)) > 1


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"credit": "total", "discounting": "objective"}, "a total return is discounted from the start"),
        ({"credit": "total", "importance": "per_step"}, "credit='reward_to_go'"),
        ({"state_discount": True}, "reinforce has discounting='objective' for it"),
        ({"self_normalised": True}, "set importance to 'trajectory' or 'per_step'"),
        ({"max_weight": 2.0}, "set importance to 'trajectory' or 'per_step'"),
        ({"gamma": 1.1}, r"gamma must lie in \[0, 1\]"),
        ({"epochs": 0}, "epochs must lie in"),
        ({"max_weight": 0.0, "importance": "per_step"}, "max_weight must lie in"),
        ({"num_steps": 0}, "num_steps must lie in"),
        ({"window": -1}, "window must lie in"),
        ({"learning_rate": 0.0}, "learning_rate must lie in"),
        ({"critic_epochs": 0}, "critic_epochs must lie in"),
        ({"minibatch_size": 0}, "minibatch_size must lie in"),
        ({"critic_learning_rate": 0.0}, "critic_learning_rate must lie in"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        REINFORCE(**settings)


def test_a_minibatch_that_does_not_divide_the_batch_is_refused():
    with pytest.raises(ValueError, match="minibatch_size=64 does not divide the batch of 8 steps x 2 environments = 16"):
        reinforce.init(REINFORCE(num_steps=8), SPEC, jax.random.key(0))
