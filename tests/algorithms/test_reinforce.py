"""REINFORCE: its gradient summed over every trajectory of the oracle, and what batches do to episodes."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from batches import Table, ValueTable, experience, oracle_rollout, part, table_spec, with_reset_rows
from oracle import TOLERANCE

from surefoot.algorithms import reinforce
from surefoot.algorithms.reinforce import REINFORCE, baselines, credits, loss
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


@pytest.mark.parametrize("baseline", ["none", "mean", "value"])
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
    mean, variance = moments_of_pairs(config, theta, behaviour)
    assert gap(mean, oracle.objective_gradient(SMALL, theta)) > 0.01
    plain = Plain(discounting="objective", baseline="none", importance=importance)
    assert variance < moments_of_pairs(plain, theta, behaviour)[1]


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


# A batch [T, N] through the whole update. Adam's first moment, begun anew, is a tenth of the gradient.

NUM_STATES, NUM_ACTIONS, NUM_ENVS = 5, 2, 2
SPEC = table_spec(NUM_STATES, NUM_ACTIONS, NUM_ENVS)
FROZEN = 1e-300  # a learning rate that leaves every parameter as it is
Still = partial(Plain, learning_rate=FROZEN, critic_learning_rate=FROZEN, num_steps=1, minibatch_size=2, window=30, critic_epochs=1)

update = jax.jit(lambda config, state, rollout: reinforce.update(config, state, rollout, None, jax.random.key(0)), static_argnums=0)


def first_state(config, logits=None, values=None, spec=SPEC):
    rng = np.random.default_rng(5)
    num_states = spec.observation_space.n
    logits = jnp.asarray(rng.normal(size=(num_states, spec.action_space.n))) if logits is None else logits
    values = jnp.asarray(rng.normal(size=num_states)) if values is None else values
    state = reinforce.init(config, spec, jax.random.key(0))
    return state._replace(
        acting=StochasticPolicy(Table(logits), None),
        critic=ValueTable(values),
        optimiser=optax.adam(config.learning_rate).init(Table(logits)),
        critic_optimiser=optax.adam(config.critic_learning_rate).init(ValueTable(values)),
    )


def ascent(state):
    return -10.0 * state.optimiser[0].mu.logits


def learn(config, rollouts):
    """Sum over batches of what each adds to the gradient's sum over episodes; (that, episodes used, last state)."""
    state = first_state(config)
    fresh, total, episodes = state.optimiser, 0.0, []
    for rollout in rollouts:
        state, metrics = update(config, state._replace(optimiser=fresh), rollout)
        total += ascent(state) * int(metrics["episodes_used"])
        episodes.append(int(metrics["episodes_used"]))
    return total, episodes, state


def by_definition(rollout, logits, values, *, bootstrap, baseline, gamma=MDP.discount):
    """Sum over ended episodes of sum_t (G_t - b(s_t)) grad log pi(a_t|s_t), in loops."""
    probs, total = np.asarray(jax.nn.softmax(logits)), np.zeros(logits.shape)
    for n in range(rollout.time.shape[1]):
        rows = []
        for t in range(len(rollout.time)):
            rows.append(t)
            if not (rollout.terminated[t, n] or rollout.truncated[t, n]):
                continue
            credit = values[rollout.final_obs[t, n]] if bootstrap and rollout.truncated[t, n] else 0.0
            for row in reversed(rows):
                credit = rollout.reward[row, n] + gamma * credit
                state, action = rollout.obs[row, n], rollout.action[row, n]
                score = -probs[state]
                score[action] += 1
                total[state] += (credit - (values[state] if baseline else 0.0)) * score
            rows = []
    return total


@pytest.mark.parametrize("baseline", ["none", "value"])
def test_gradient_of_a_batch_by_definition_bootstrapped_at_a_truncation_only_with_a_learned_value(baseline):
    config = Still(baseline=baseline)
    rollout = experience(SPEC)
    total, episodes, state = learn(config, [rollout])
    learned = baseline == "value"
    expected = by_definition(rollout, state.acting.actor.logits, np.asarray(state.critic.values), bootstrap=learned, baseline=learned)
    np.testing.assert_allclose(total, expected, **TOLERANCE)
    assert episodes == [12]
    assert rollout.truncated.sum() > 2
    assert rollout.terminated.sum() > 2


@pytest.mark.parametrize("settings", [{"baseline": "none"}, {"baseline": "value"}, {"baseline": "mean", "credit": "total"}])
def test_every_episode_counts_once_wherever_the_batches_are_cut(settings):
    config = Still(**settings)
    rollout = experience(SPEC, (3, 1, 5, 2, 4, 1, 8, 6, 2), seed=3)
    whole, episodes, _ = learn(config, [rollout])
    assert episodes == [18]
    for cuts in (range(0, 33, 4), (0, 1, 5, 13, 17, 18, 22, 30, 31, 32)):
        total, episodes, state = learn(config, [part(rollout, begin, end) for begin, end in pairwise(cuts)])
        assert sum(episodes) == 18
        if settings["baseline"] == "mean":  # which depends on the batches before
            assert abs(state.mean_credit.mean) > 0.01
            continue
        np.testing.assert_allclose(total, whole, **TOLERANCE)


def test_episodes_longer_than_window_and_batch_together_are_left_out():
    lengths = (5, 1, 3, 6, 2, 4)
    rollout = experience(SPEC, lengths)
    for window, fits in ((4, lambda end, length: length <= 4 + (end - 1) % 3 + 1), (0, lambda end, length: length <= (end - 1) % 3 + 1)):
        _, episodes, _ = learn(Still(baseline="none", window=window), [part(rollout, begin, begin + 3) for begin in range(0, 21, 3)])
        ends = [(t + 1, rollout.time[t, n] + 1) for t, n in np.argwhere(rollout.terminated | rollout.truncated)]
        assert sum(episodes) == sum(fits(end, length) for end, length in ends) < 12


def test_an_episode_that_began_before_the_first_batch_is_left_out():
    _, episodes, _ = learn(Still(baseline="none"), [experience(SPEC, begun=2)])
    assert episodes == [10]


def test_where_no_episode_has_ended_the_policy_keeps_its_bits():
    config = Plain(importance="per_step", self_normalised=True, num_steps=1, minibatch_size=2, window=3, epochs=2, critic_epochs=1)
    state, _ = update(config, first_state(config), experience(SPEC, (2, 3)))
    for key in (1, 2):
        after, metrics = update(config, state, experience(SPEC, (), unfinished=5, seed=key))
        jax.tree.map(np.testing.assert_array_equal, (after.acting, after.optimiser), (state.acting, state.optimiser))
        assert metrics["episodes_used"] == 0
        assert np.isfinite(metrics["policy_loss"])
        assert metrics["gradient_norm"] == 0
    assert np.any(state.optimiser[0].mu.logits != 0)
    assert np.any(after.critic.values != state.critic.values)  # which learns from every row


@pytest.mark.parametrize(
    "settings",
    [
        {"baseline": "value"},
        {"baseline": "leave_one_out", "credit": "total"},
        {"baseline": "mean", "importance": "per_step", "self_normalised": True, "normalise_advantage": True, "discounting": "objective"},
    ],
)
def test_rows_of_a_reset_do_not_matter(settings):
    config = Still(**settings)
    rollouts = [experience(SPEC, unfinished=2, seed=3), experience(SPEC, begun=2, seed=4)]
    plain, episodes, state = learn(config, rollouts)
    with_rows, _, other = learn(config, [with_reset_rows(rollout) for rollout in rollouts])
    assert episodes == [12, 12]
    np.testing.assert_allclose(with_rows, plain, **TOLERANCE)
    np.testing.assert_allclose(other.mean_credit, state.mean_credit, rtol=1e-6)


def test_the_mean_baseline_is_that_of_the_batches_before():
    config, rollout = Still(baseline="mean"), experience(SPEC)
    state, _ = update(config, first_state(config), rollout)
    credit = credits(config, rows_of(rollout, rollout.reward, np.zeros(rollout.time.shape), None), rollout.reward)
    np.testing.assert_allclose(state.mean_credit.mean, np.mean(credit), rtol=1e-6)
    later = experience(SPEC, seed=8)
    after, _ = update(config, state._replace(optimiser=first_state(config).optimiser), later)
    logits = state.acting.actor.logits
    constant = np.full(NUM_STATES, state.mean_credit.mean)
    np.testing.assert_allclose(12 * ascent(after), by_definition(later, logits, constant, bootstrap=False, baseline=True), **TOLERANCE)


def test_a_learned_value_is_an_unbiased_baseline_of_an_episode_cut_by_a_batch():
    """The critic is fitted to the first half of an episode before the second half arrives: the first half keeps its older values."""
    theta = oracle.random_logits(SMALL, 1)
    num_observations = 3 * len(SMALL.start)
    spec = table_spec(num_observations, 2, 1)
    config = Still(discounting="objective", window=1, minibatch_size=1, critic_learning_rate=0.5)
    values = jnp.asarray(np.random.default_rng(0).normal(size=num_observations))
    start = first_state(config, theta, values, spec)

    def halves(rollout):
        rollout = jax.tree.map(lambda x: x[:, None] if x.ndim == 1 else x[None], rollout)
        first, metrics = reinforce.update(config, start, part(rollout, 0, 1), None, jax.random.key(0))
        second, more = reinforce.update(config, first._replace(optimiser=start.optimiser), part(rollout, 1, 2), None, jax.random.key(0))
        return ascent(first) + ascent(second), metrics["episodes_used"] + more["episodes_used"], first.critic.values

    rollout = oracle_rollout(SMALL, SMALL_BATCH)._replace(progress=np.zeros(SMALL_BATCH.valid.shape[1]))
    axes = rollout._replace(**dict.fromkeys(rollout._fields, 1), last_obs=0, progress=0, **dict.fromkeys(rollout._fields[-4:]))
    estimates, episodes, fitted = jax.jit(jax.vmap(halves, in_axes=(axes,)))(jax.tree.map(jnp.asarray, rollout))
    np.testing.assert_array_equal(episodes, 1)
    assert np.all(np.max(np.abs(fitted - values), axis=-1) > 0.1)
    prob = oracle.probability(theta, SMALL_BATCH)
    np.testing.assert_allclose(prob @ estimates.reshape(len(prob), -1), oracle.objective_gradient(SMALL, theta), **TOLERANCE)
