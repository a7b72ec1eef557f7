"""Off-policy actor-critic: gradients and targets as sums over the oracle, whole runs against a learner in NumPy, and where it ends."""

from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from batches import ENDS, FLOATS, FOLLOWING, PAID, Adam, Table, ValueTable, best_values, every_pair, experience, oracle_rollout, table_spec
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from jax.flatten_util import ravel_pytree
from oracle import TOLERANCE

from surefoot.algorithms import off_policy_actor_critic
from surefoot.algorithms.off_policy_actor_critic import OffPolicyActorCritic, actor_loss, judge, policy_values, sampled_values
from surefoot.audit import step_audit
from surefoot.distributions import Categorical, DiagonalGaussian, MultiCategorical
from surefoot.pathwise import start_optimisers
from surefoot.policies import StochasticPolicy
from surefoot.replay import Sequences, draw_uniform, insert
from surefoot.types import EnvironmentSpec

x64 = pytest.mark.usefixtures("x64")

MDP = oracle.random_mdp(0)
UNDISCOUNTED = oracle.random_mdp(0, discount=1.0)
BATCH = oracle.trajectories(MDP)
S, A, H = 3, 2, 3
KEY = partial(jax.random.key, 0)
Plain = partial(OffPolicyActorCritic, entropy_coef=0.0, gamma=MDP.discount)


class ActionTable(eqx.Module):
    """A critic of actions: a value for each at each observation."""

    values: jax.Array

    def __call__(self, obs, features):
        return self.values[obs]


class VectorTable(Table):
    """An actor whose action is a vector of one choice."""

    def choose(self, features, action_mask):
        return MultiCategorical.from_logits(features, features.shape[-1:], action_mask)


def sequences_of(theta):
    """Every trajectory as a replayed sequence, acted by the policy of `theta`."""
    rollout = oracle_rollout(MDP, BATCH)
    return Sequences(
        obs=jnp.concatenate([rollout.obs[:1], rollout.final_obs]),
        action=jnp.asarray(BATCH.action, jnp.int32),
        reward=jnp.asarray(BATCH.reward),
        terminated=jnp.asarray(BATCH.terminated),
        truncated=jnp.asarray(BATCH.truncated),
        valid=jnp.asarray(BATCH.valid),
        old_log_prob=oracle.log_prob(theta, BATCH),
    )


def policies():
    """The policy that learns, and the one that acted."""
    return oracle.random_logits(MDP, 1), 1.5 * oracle.random_logits(MDP, 2)


def random_table(seed=3):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(H, S, A)))


def critic_of(action_value):
    """Q [H, S, A] as a critic; nothing is left at the horizon."""
    return ActionTable(jnp.concatenate([jnp.asarray(action_value).reshape(-1, A), jnp.zeros((S, A))]))


def mean_ascent(config, theta, critic, acted_by, judged_by=None):
    """The expectation [D] of the sum of an actor's gradient over an episode of the policy that acted."""
    every = sequences_of(acted_by)

    def ascent(batch):
        batch = jax.tree.map(lambda x: x[:, None], batch)
        advantage = None if judged_by is None else judge(config, Table(theta), judged_by, batch, KEY())[1]
        gradient = jax.grad(lambda theta: actor_loss(config, Table(theta), critic, batch, advantage, KEY())[0])(theta)
        return -jnp.sum(batch.valid) * gradient.ravel()

    return oracle.probability(acted_by, BATCH) @ oracle.compiled(jax.vmap(ascent, in_axes=1), every)


def expected_ascent(theta, acted_by, action_value):
    """sum_s d(s) sum_a grad pi(a|s) Q(s, a), with d of the policy that acted and any Q."""
    visited = oracle.state_distribution(MDP, acted_by)
    return jax.grad(lambda theta: jnp.einsum("hs,sa,hsa->", visited, jax.nn.softmax(theta), action_value))(theta).ravel()


def by_state_and_action(acted_by, estimate):
    """Mean [H, S, A] of the rows [H, N] of each state and action at each time; NaN where there are none."""
    prob, means = np.asarray(oracle.probability(acted_by, BATCH)), np.full((H, S, A), np.nan)
    for t, s, a in np.ndindex(means.shape):
        here = BATCH.valid[t] & (BATCH.state[t] == s) & (BATCH.action[t] == a)
        if here.any():
            means[t, s, a] = prob[here] @ np.asarray(estimate)[t, here] / prob[here].sum()
    return means


def backed_up(theta, action_value):
    """The Bellman operator of the policy on Q [H, S, A]."""
    value = jnp.sum(jax.nn.softmax(theta) * action_value, axis=-1) * ~MDP.terminal
    following = jnp.concatenate([value[1:], jnp.zeros((1, S))])
    return jnp.einsum("sax,hsax->hsa", MDP.transition, MDP.reward + MDP.discount * following[:, None, None, :])


def targets(config, theta, acted_by, critic):
    return oracle.compiled(lambda batch: judge(config, Table(theta), critic, batch, KEY())[0], sequences_of(acted_by))


# On the oracle: the actor


@x64
def test_the_actors_gradient_is_the_sum_over_actions_at_the_states_that_were_replayed_whatever_q():
    theta, behaviour = policies()
    for action_value in (oracle.values(MDP, theta)[1], random_table()):
        mean = mean_ascent(Plain(), theta, critic_of(action_value), behaviour)
        np.testing.assert_allclose(mean, expected_ascent(theta, behaviour, action_value), **TOLERANCE)


@x64
def test_it_is_the_policy_gradient_where_the_policy_itself_has_acted():
    theta, _ = policies()
    mean = mean_ascent(Plain(), theta, critic_of(oracle.values(UNDISCOUNTED, theta)[1]), theta)
    np.testing.assert_allclose(mean, oracle.objective_gradient(UNDISCOUNTED, theta), **TOLERANCE)
    config = Plain(critic_target="vtrace", gamma=1.0)
    mean = mean_ascent(config, theta, None, theta, judged_by=ValueTable(oracle.values(UNDISCOUNTED, theta)[0].ravel()))
    np.testing.assert_allclose(mean, oracle.objective_gradient(UNDISCOUNTED, theta), **TOLERANCE)


def one_row(obs):
    no = jnp.zeros((1, 1), bool)
    return Sequences(jnp.asarray(obs)[None, None].repeat(2, axis=0), None, None, no, no, ~no)


@x64
def test_of_a_vector_of_choices_it_is_that_sum_over_all_draws(monkeypatch):
    """Over every pair of actions that can be drawn afresh, with its probability."""
    theta, _ = policies()
    q = random_table()[0]
    for s in range(S):

        def ascent(theta, pair, s=s):
            drawn = pair[:, None, None, None], q[s, pair][:, None, None]
            monkeypatch.setattr(off_policy_actor_critic, "sampled_values", lambda *_: drawn)
            return -actor_loss(Plain(), VectorTable(theta), None, one_row(s), None, None)[0]

        p, total = jax.nn.softmax(theta[s]), 0.0
        for pair in np.ndindex(A, A):
            total += p[pair[0]] * p[pair[1]] * jax.grad(ascent)(theta, jnp.asarray(pair))
        np.testing.assert_allclose(total, jax.grad(lambda theta, s=s: jax.nn.softmax(theta[s]) @ q[s])(theta), **TOLERANCE)


class Normal(eqx.Module):
    """An actor that knows but one state."""

    mean: jax.Array
    log_std: jax.Array
    memory: None = None

    def torso(self, obs):
        return self.mean

    def choose(self, features, action_mask):
        return DiagonalGaussian(features, self.log_std)


@x64
def test_of_numbers_it_is_the_gradient_of_the_integral(monkeypatch):
    """By quadrature over pairs of actions, exact for the polynomials that Q and the score are."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)
    actor = Normal(jnp.asarray([0.4]), jnp.asarray([-0.3]))

    def q(action):
        return action**2 - 0.7 * action

    def action_at(actor, node):
        return actor.mean[0] + jnp.exp(actor.log_std[0]) * node

    def ascent(actor, pair):
        drawn = pair[:, None, None, None], q(pair)[:, None, None]
        monkeypatch.setattr(off_policy_actor_critic, "sampled_values", lambda *_: drawn)
        return -actor_loss(Plain(), actor, None, one_row(0.0), None, None)[0]

    prob = weights / weights.sum()
    total = jax.tree.map(jnp.zeros_like, actor)
    for i, j in np.ndindex(5, 5):
        gradient = jax.grad(ascent)(actor, jnp.stack([action_at(actor, nodes[i]), action_at(actor, nodes[j])]))
        total = jax.tree.map(lambda total, one, i=i, j=j: total + prob[i] * prob[j] * one, total, gradient)
    expected = jax.grad(lambda actor: jnp.sum(prob * q(action_at(actor, nodes))))(actor)
    np.testing.assert_allclose(ravel_pytree(total)[0], ravel_pytree(expected)[0], **TOLERANCE)


@x64
def test_actions_are_drawn_afresh_from_the_policy_and_valued_one_by_one():
    class Sums(eqx.Module):
        def __call__(self, obs, features):
            return obs + jnp.arange(A)

    probs, obs = np.array([0.3, 0.7]), jnp.asarray([[10.0, 20.0]])
    policy = Categorical(jnp.log(jnp.broadcast_to(probs, (1, 2, A))))
    action, value = sampled_values(Plain(action_samples=4000), Sums(), policy, obs, KEY())
    assert action.shape == value.shape == (4000, 1, 2)
    np.testing.assert_array_equal(value, obs + action)
    np.testing.assert_allclose(np.mean(action == 1, axis=0), [[0.7, 0.7]], atol=5 * np.sqrt(0.21 / 4000))
    assert np.any(action[:, 0, 0] != action[:, 0, 1])
    of_vectors = MultiCategorical(Categorical(policy.log_probs[:, :, None]))
    critic = off_policy_actor_critic.init(Plain(), EnvironmentSpec("vectors", FLOATS, MultiDiscrete([A]), 1), KEY()).critic
    config, obs = Plain(action_samples=5), jnp.zeros((1, 2, 3))
    mean = policy_values(config, critic, of_vectors, obs, KEY())
    np.testing.assert_allclose(mean, jnp.mean(sampled_values(config, critic, of_vectors, obs, KEY())[1], axis=0), **TOLERANCE)


# On the oracle: the critic


@x64
def test_the_target_of_one_step_is_on_average_the_bellman_operator_of_the_policy_whoever_acted():
    theta, behaviour = policies()
    for action_value in (oracle.values(MDP, theta)[1], random_table()):
        means = by_state_and_action(behaviour, targets(Plain(), theta, behaviour, critic_of(action_value)))
        expected = np.where(np.isnan(means), np.nan, backed_up(theta, action_value))
        np.testing.assert_allclose(means, expected, **TOLERANCE)
    assert np.isfinite(means[:, ~MDP.terminal]).all()


@x64
@pytest.mark.parametrize("trace_decay", [0.5, 1.0])
def test_retrace_comes_from_any_table_to_the_values_of_the_policy_and_stays_there(trace_decay):
    theta, behaviour = policies()
    config = Plain(critic_target="retrace", trace_decay=trace_decay)
    exact = np.asarray(oracle.values(MDP, theta)[1])
    means = by_state_and_action(behaviour, targets(config, theta, behaviour, critic_of(exact)))
    np.testing.assert_allclose(means[:, ~MDP.terminal], exact[:, ~MDP.terminal], **TOLERANCE)
    table = np.asarray(random_table())
    for _ in range(H):
        means = by_state_and_action(behaviour, targets(config, theta, behaviour, critic_of(table)))
        table = np.where(np.isnan(means), table, means)
    np.testing.assert_allclose(table[:, ~MDP.terminal], exact[:, ~MDP.terminal], **TOLERANCE)


@x64
def test_retrace_without_a_trace_is_one_step():
    theta, behaviour = policies()
    configs = Plain(critic_target="retrace", trace_decay=0.0), Plain(), Plain(critic_target="retrace")
    short, one_step, long = (targets(config, theta, behaviour, critic_of(random_table())) for config in configs)
    np.testing.assert_allclose(short[BATCH.valid], one_step[BATCH.valid], **TOLERANCE)
    assert np.max(np.abs(long - short)[BATCH.valid]) > 0.1


@x64
def test_vtrace_leads_to_a_policy_between_the_two_and_the_actor_follows_its_advantages():
    """Espeholt et al. 2018, eq. 3 and section 4.2: of pi_rho ~ min(mu, pi)."""
    theta, behaviour = policies()
    mu, pi = jax.nn.softmax(behaviour), jax.nn.softmax(theta)
    value, action_value = oracle.values(MDP, jnp.log(jnp.minimum(mu, pi)))
    config, critic = Plain(critic_target="vtrace"), ValueTable(value.ravel())
    prob = np.asarray(oracle.probability(behaviour, BATCH))
    target = np.asarray(targets(config, theta, behaviour, critic))
    for t, s in np.ndindex(H, S - 1):
        here = BATCH.valid[t] & (BATCH.state[t] == s)
        np.testing.assert_allclose(prob[here] @ target[t, here] / prob[here].sum(), value[t, s], **TOLERANCE)
    assert np.max(np.abs(value - oracle.values(MDP, theta)[0])) > 0.01
    mean = mean_ascent(config, theta, None, behaviour, judged_by=critic)
    visited, advantage = oracle.state_distribution(MDP, behaviour), action_value - value[:-1, :, None]

    def objective(theta):
        return jnp.einsum("hs,sa,sa,hsa->", visited, mu * jnp.minimum(pi / mu, 1), jax.nn.log_softmax(theta), advantage)

    np.testing.assert_allclose(mean, jax.grad(objective)(theta).ravel(), **TOLERANCE)


# Whole runs against a learner in NumPy


ROWS, LENGTH, STEPS = 8, 3, 3
SPEC = table_spec(num_observations=5, num_actions=3, num_envs=2)
Run = partial(
    OffPolicyActorCritic,
    **{"gamma": 0.9, "hidden": (), "num_steps": ROWS, "replay_size": 50, "learning_starts": 17, "update_to_data": STEPS / (2 * ROWS)},
    **{"minibatch_size": 4 * LENGTH, "target_rate": 0.2, "actor_learning_rate": 0.03, "critic_learning_rate": 0.1, "entropy_coef": 0.1},
)
SETTINGS = {
    "one step": {},
    "Retrace": {"critic_target": "retrace", "sequence_length": LENGTH, "trace_decay": 0.8},
    "V-trace": {"critic_target": "vtrace", "sequence_length": LENGTH, "trace_decay": 0.8},
}

update = jax.jit(lambda config, state, rollout, key: off_policy_actor_critic.update(config, state, rollout, None, key), static_argnums=0)


def first_state(config, spec=SPEC):
    rng, size = np.random.default_rng(5), spec.observation_space.n
    actor, values = Table(jnp.asarray(rng.normal(size=(size, spec.action_space.n)))), rng.normal(size=(size, spec.action_space.n))
    critic = ValueTable(jnp.asarray(values[:, 0])) if config.critic_target == "vtrace" else ActionTable(jnp.asarray(values))
    start = off_policy_actor_critic.init(config, spec, jax.random.key(0))
    optimisers = start_optimisers(config, actor, critic)
    return start._replace(acting=StochasticPolicy(actor, None), critic=critic, target_critic=critic, optimisers=optimisers)


def some_rows(seed, masked):
    """Random rows, acted by whomever; legal actions are random, and those taken are among them."""
    rollout, rng = experience(SPEC, (3, 2), unfinished=3, seed=seed), np.random.default_rng(seed)
    if not masked:
        return rollout
    mask, final_mask = rng.random((2, ROWS, 2, 3)) < 0.5
    return rollout._replace(
        action_mask=mask | np.eye(3, dtype=bool)[rollout.action],
        final_action_mask=final_mask | (np.arange(3) == 1),
        last_action_mask=final_mask[0] | (np.arange(3) == 2),
    )


class ByDefinition:
    """Tables of the actor and of the critic, moved as the papers' words say."""

    def __init__(self, config, state):
        self.config, self.theta = config, np.array(state.acting.actor.logits)
        self.critic = np.array(state.critic.values)
        self.target, self.of_actor, self.of_critic = self.critic.copy(), Adam(), Adam()

    def policy(self, obs, legal):
        legal = np.ones(3, bool) if legal is None else legal
        weight = np.exp(self.theta[obs]) * legal
        return weight / weight.sum()

    def value(self, obs, legal):
        return self.target[obs] if self.target.ndim == 1 else self.policy(obs, legal) @ self.target[obs]

    def sequence(self, replay, index, length):
        """The rows that count from a place of the replay on, each with its successor and whether the next one continues it."""
        rows, ring, found = jax.tree.map(np.asarray, replay.rows), len(replay.order) // 2, []
        stream, place = divmod(int(index), ring)
        for _ in range(length):
            if place == int(replay.cursor[stream]) % ring:
                break
            at, after = ring * stream + place, ring * stream + (place + 1) % ring
            place = (place + 1) % ring
            if rows.acted[at]:
                masks = (None, None) if rows.action_mask is None else (rows.action_mask[at], rows.action_mask[after])
                ended = rows.terminated[at] or rows.truncated[at] or place == int(replay.cursor[stream]) % ring
                found.append((rows.obs[at], rows.action[at], rows.reward[at], rows.terminated[at], rows.obs[after], *masks, ended, at))
        return found

    def judged(self, replay, index):
        """(observation, mask, action, target, advantage) of each row that counts."""
        config, results, chain = self.config, [], (0.0, 0.0)
        behind = False  # whether the row after this one, in time, continues it within the sequence
        for obs, action, reward, terminated, following, mask, next_mask, ended, at in reversed(self.sequence(replay, index, config.length)):
            ahead = reward + 0.9 * (0.0 if terminated else self.value(following, next_mask))
            goes_on = behind and not ended
            if config.critic_target == "one_step":
                results.append((obs, mask, action, ahead, None))
                continue
            ratio = self.policy(obs, mask)[action] / np.exp(np.asarray(replay.rows.old_log_prob)[at])
            trace, correction = config.trace_decay * min(ratio, 1.0), chain[1] if goes_on else 0.0
            if config.critic_target == "retrace":
                own = self.target[obs, action]
                changed = ahead - own + 0.9 * correction
                results.append((obs, mask, action, own + changed, None))
                chain = changed, trace * changed
            else:
                own = self.target[obs]
                changed = min(ratio, 1.0) * (ahead - own) + 0.9 * trace * (chain[0] if goes_on else 0.0)
                advantage = min(ratio, 1.0) * (ahead + 0.9 * config.trace_decay * (chain[0] if goes_on else 0.0) - own)
                results.append((obs, mask, action, own + changed, advantage))
                chain = changed, None
            behind = True
        return results

    def step(self, replay, indices):
        rows = [row for index in indices for row in self.judged(replay, index)]
        of_critic, of_actor, entropy = np.zeros(self.critic.shape), np.zeros(self.theta.shape), 0.0
        for obs, _, action, target, _ in rows:
            entry = (obs,) if self.critic.ndim == 1 else (obs, action)
            of_critic[entry] += (self.critic[entry] - target) / len(rows)
        self.critic = self.critic - 0.1 * self.of_critic(of_critic)
        for obs, mask, action, _, advantage in rows:
            p = self.policy(obs, mask)
            log_p = np.log(np.where(p > 0, p, 1))
            entropy = -p @ log_p
            worth = p * (self.critic[obs] - p @ self.critic[obs]) if advantage is None else advantage * ((np.arange(3) == action) - p)
            of_actor[obs] -= (worth - 0.1 * p * (log_p + entropy)) / len(rows)
        self.theta = self.theta - 0.03 * self.of_actor(of_actor)
        self.target = 0.8 * self.target + 0.2 * self.critic
        return len(rows)


@pytest.mark.parametrize(("kind", "masked"), [("one step", False), *((kind, True) for kind in SETTINGS)])
def test_a_run_is_that_of_a_learner_in_numpy(kind, masked):
    """Nothing is learned from the first 16 transitions; three steps of critic and actor follow on every 16 more, until rings are full."""
    config, spec = Run(**SETTINGS[kind]), replace(SPEC, has_action_mask=masked)
    state = first_state(config, spec)
    expected, counts = ByDefinition(config, state), []
    for index in range(5):
        key, rollout = jax.random.fold_in(jax.random.key(7), index), some_rows(index, masked)
        mask = None if not masked else rollout.action_mask
        old = Categorical.from_logits(state.acting.actor.logits[rollout.obs], mask)
        log_prob = None if kind == "one step" else old.log_prob(rollout.action)
        filled = jax.jit(insert)(state.replay, rollout, log_prob)
        before, (state, metrics) = state, update(config, state, rollout, key)
        if index == 0:
            for was, now in zip(jax.tree.leaves(before._replace(replay=None)), jax.tree.leaves(state._replace(replay=None)), strict=True):
                np.testing.assert_array_equal(was, now)
            assert metrics["kl"] == 0
            continue
        counts += [expected.step(filled, rows) for rows in draw_uniform(filled, jax.random.split(key, 3)[0], (STEPS, 12 // config.length))]
        np.testing.assert_allclose(state.critic.values, expected.critic, rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(state.acting.actor.logits, expected.theta, rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(state.target_critic.values, expected.target, rtol=2e-4, atol=2e-5)
    assert max(counts) <= 12
    assert min(counts) < 12 or kind == "one step"  # there were ends of episodes, or of the replay, in the sequences
    assert (state.replay.expired > 0).all()


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_audit_is_of_the_rollout_by_what_the_critic_said_before(kind):
    config, rollout = Run(**SETTINGS[kind]), some_rows(0, masked=True)
    state = first_state(config, replace(SPEC, has_action_mask=True))
    state, _ = update(config, state, rollout, jax.random.key(1))
    after, metrics = update(config, state, rollout, jax.random.key(2))
    old, new = (Categorical.from_logits(one.acting.actor.logits[rollout.obs], rollout.action_mask) for one in (state, after))
    values, advantage = np.asarray(state.critic.values), np.zeros((ROWS, 2))
    for t, n in np.ndindex(ROWS, 2):
        obs = rollout.obs[t, n]
        if kind != "V-trace":
            advantage[t, n] = values[obs, rollout.action[t, n]] - np.exp(old.log_probs[t, n]) @ values[obs]
            continue
        ended = rollout.terminated[t, n] or rollout.truncated[t, n]
        following = rollout.final_obs[t, n] if ended else rollout.last_obs[n] if t == ROWS - 1 else rollout.obs[t + 1, n]
        advantage[t, n] = rollout.reward[t, n] + 0.9 * values[following] * (not rollout.terminated[t, n]) - values[obs]
    for name, value in step_audit(old, new, rollout, jnp.asarray(advantage), discount=0.9).items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-4, atol=1e-6, err_msg=name)
    assert metrics["kl"] > 1e-6


def test_another_policy_that_acted_is_corrected_for():
    """The replay has the log-probabilities of the one that acted; what the step promises is foreseen for the one that it was made from."""
    config, rollout = Run(**SETTINGS["Retrace"]), some_rows(0, masked=False)
    state, _ = update(config, first_state(config), rollout, jax.random.key(1))
    logits = jnp.asarray(np.random.default_rng(6).normal(size=state.acting.actor.logits.shape))
    after, metrics = update(config, state, rollout._replace(acting=StochasticPolicy(Table(logits), None)), jax.random.key(2))
    acted, old, new = (Categorical.from_logits(x[rollout.obs]) for x in (logits, state.acting.actor.logits, after.acting.actor.logits))
    log_prob, old_log_prob = acted.log_prob(rollout.action), old.log_prob(rollout.action)
    expected = insert(state.replay, rollout, log_prob).rows.old_log_prob
    np.testing.assert_allclose(after.replay.rows.old_log_prob, expected, rtol=1e-5)
    values = state.critic.values[rollout.obs]
    taken = jnp.take_along_axis(values, rollout.action[..., None], axis=-1)[..., 0]
    advantage = (taken - jnp.sum(jnp.exp(old.log_probs) * values, axis=-1)) * jnp.exp(old_log_prob - log_prob)
    for name, value in step_audit(old, new, rollout, advantage, discount=0.9).items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-4, atol=1e-6, err_msg=name)
    assert metrics["predicted_improvement"] != 0


# Where it ends


def test_a_table_ends_at_the_values_of_the_best_policy():
    spec = EnvironmentSpec("pairs", Discrete(4), Discrete(2), 8)
    config = Plain(
        **{"gamma": 0.9, "learning_starts": 1, "num_steps": 1, "update_to_data": 1.0, "minibatch_size": 32, "replay_size": 200},
        **{"critic_learning_rate": 0.02, "actor_learning_rate": 0.1, "target_rate": 0.05},
    )

    @jax.jit
    def run(state):
        def iteration(state, index):
            return off_policy_actor_critic.update(config, state, every_pair(), None, jax.random.fold_in(KEY(), index))[0], None

        return jax.lax.scan(iteration, state, jnp.arange(300))[0]

    state, best = run(first_state(config, spec)), best_values(FOLLOWING, PAID, ENDS, 0.9)
    np.testing.assert_allclose(state.critic.values, best, atol=0.05)
    action, _ = off_policy_actor_critic.act(config, state.acting, jnp.arange(4), None, None, None)
    np.testing.assert_array_equal(action, best.argmax(axis=1))


# Networks


@pytest.mark.parametrize("space", [Discrete(3), Box(-1.0, 1.0, (2,)), MultiDiscrete([2, 3])], ids=["a choice", "numbers", "choices"])
def test_the_critic_suits_the_actions(space):
    spec = EnvironmentSpec("floats", FLOATS, space, 2)
    state = jax.eval_shape(partial(off_policy_actor_critic.init, Run(), spec), jax.random.key(0))
    assert state.critic.head.out_features == (3 if isinstance(space, Discrete) else 1)
    assert state.replay.rows.old_log_prob is None
    state = jax.eval_shape(partial(off_policy_actor_critic.init, Run(**SETTINGS["V-trace"]), spec), jax.random.key(0))
    assert state.critic.head.out_features == 1
    assert state.replay.rows.old_log_prob.shape == (50,)
