"""Actor-critic: its gradient summed over every trajectory of the oracle, whole updates in loops, both forms and every critic."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from batches import FLOATS, PER_ROW, Table, ValueTable, batches_of, experience, oracle_rollout, part, table_spec, values_of, with_reset_rows
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from jax.flatten_util import ravel_pytree
from oracle import TOLERANCE

from surefoot.algorithms import actor_critic
from surefoot.algorithms.actor_critic import ActorCritic, judge
from surefoot.audit import step_audit
from surefoot.critics import critic_optimiser, taken_values
from surefoot.distributions import Categorical
from surefoot.estimates import observe
from surefoot.pathwise import ActionCritic
from surefoot.policies import StochasticPolicy
from surefoot.types import EnvironmentSpec

pytestmark = pytest.mark.usefixtures("x64")

MDP = oracle.random_mdp(0, discount=1.0)
BATCH = oracle.trajectories(MDP)
CRITICS = ["value", "action_value", "both"]
ROWS = 8
SPEC = table_spec(num_observations=5, num_actions=3, num_envs=2)
Plain = partial(ActorCritic, normalise_reward=False, normalise_observation=False)
Whole = partial(Plain, num_steps=ROWS, gamma=0.9, learning_rate=0.1, critic_learning_rate=0.2, critic_epochs=3)
Online = partial(Plain, num_steps=1, critic_epochs=1, fit_first=False)

update = jax.jit(lambda config, state, rollout: actor_critic.update(config, state, rollout, None, jax.random.key(0)), static_argnums=0)


class ActionTable(eqx.Module):
    """A critic of actions: a value for each at each observation."""

    values: jax.Array

    def __call__(self, obs, features):
        return self.values[obs]


def first_state(config, logits=None, values=None, action_values=None, spec=SPEC):
    rng, size, num_actions = np.random.default_rng(5), spec.observation_space.n, spec.action_space.n
    start = actor_critic.init(config, spec, jax.random.key(0))
    actor = Table(jnp.asarray(rng.normal(size=(size, num_actions)) if logits is None else logits))
    critic = ValueTable(jnp.asarray(rng.normal(size=size) if values is None else values))
    action_critic = ActionTable(jnp.asarray(rng.normal(size=(size, num_actions)) if action_values is None else action_values))
    has_critic, has_action_critic = config.critic != "action_value", config.critic != "value"
    return start._replace(
        acting=StochasticPolicy(actor, None),
        critic=critic if has_critic else None,
        action_critic=action_critic if has_action_critic else None,
        optimiser=jax.tree.map(lambda x: jnp.zeros(actor.logits.size) if x.ndim else x, start.optimiser),
        critic_optimiser=critic_optimiser(config, critic) if has_critic else None,
        action_critic_optimiser=critic_optimiser(config, action_critic) if has_action_critic else None,
    )


def parameters(state):
    return np.asarray(ravel_pytree((state.acting.actor, state.critic, state.action_critic))[0])


def logits(state):
    return np.asarray(state.acting.actor.logits)


# The gradient on the oracle


def mean_update(config):
    """What an update makes of each trajectory with exact critics, and their expectation [D], as ascent; one environment."""
    theta = oracle.random_logits(MDP, 1)
    value, action_value = oracle.values(MDP, theta)
    action_value = np.concatenate([action_value, np.zeros((1, *action_value.shape[1:]))])  # none is left at the horizon
    spec = table_spec(value.size, 2, 1)
    state = first_state(config, theta, value.ravel(), (~MDP.terminal[:, None] * action_value).reshape(value.size, 2), spec)
    every = oracle_rollout(MDP, BATCH)

    def ascent(rows):
        rollout = every._replace(**jax.tree.map(lambda x: x[:, None], rows), last_obs=rows["final_obs"][-1:])
        total = 0.0
        for begin in range(0, MDP.horizon, config.num_steps):
            batch = part(rollout, begin, begin + config.num_steps)
            batch = batch._replace(last_obs=batch.final_obs[-1])
            after, _ = actor_critic.update(config, state, batch, None, jax.random.key(0))
            # Adam's first moment, begun anew, is a tenth of the gradient; the loss is a mean over rows.
            total += -10.0 * jnp.sum(batch.valid) * after.optimiser.mu
        return total

    estimates = oracle.compiled(jax.vmap(ascent, in_axes=1), {name: jnp.asarray(getattr(every, name)) for name in PER_ROW})
    return oracle.probability(theta, BATCH) @ estimates, oracle.objective_gradient(MDP, theta)


@pytest.mark.parametrize("target", ["td", "monte_carlo"])
@pytest.mark.parametrize("critic", CRITICS)
def test_an_update_follows_the_policy_gradient(critic, target):
    mean, gradient = mean_update(Plain(gamma=1.0, critic=critic, target=target, num_steps=3, fit_first=False))
    np.testing.assert_allclose(mean, gradient, **TOLERANCE)


@pytest.mark.parametrize("critic", CRITICS)
def test_the_online_updates_of_an_episode_follow_the_policy_gradient(critic):
    mean, gradient = mean_update(Online(gamma=1.0, critic=critic))
    np.testing.assert_allclose(mean, gradient, **TOLERANCE)


@pytest.mark.parametrize("critic", CRITICS)
def test_critics_fitted_to_the_batch_that_they_judge_are_biased_by_it(critic):
    settings = {"gamma": 1.0, "critic": critic, "num_steps": 3, "critic_epochs": 5}
    mean, gradient = mean_update(Plain(**settings, critic_learning_rate=0.1))
    assert np.max(np.abs(mean - gradient)) > 0.01
    mean, gradient = mean_update(Plain(**settings, critic_learning_rate=1e-14))
    np.testing.assert_allclose(mean, gradient, **TOLERANCE)


# Control variates that depend on the action


DISCOUNTED = oracle.random_mdp(0)
Varied = partial(Plain, critic="both", control_variate=True, fit_first=False, gamma=DISCOUNTED.discount, state_discount=True, num_steps=3)


@partial(jax.jit, static_argnums=0)
def varied(config, theta, noise):
    """(mean [D], variance) of the ascent of whole episodes with exact V and `noise` more than the exact Q; None is without Q."""
    value, action_value = oracle.values(DISCOUNTED, theta)
    spec = table_spec(value.size, 2, 1)
    table = jnp.zeros((value.size, 2)) if noise is None else jnp.concatenate([action_value.reshape(-1, 2), jnp.zeros((3, 2))]) + noise
    state = first_state(config, theta, value.ravel(), table, spec)
    every = oracle_rollout(DISCOUNTED, BATCH)

    def ascent(rows):
        batch = every._replace(**jax.tree.map(lambda x: x[:, None], rows), last_obs=rows["final_obs"][-1:])
        after, _ = actor_critic.update(config, state, batch, None, jax.random.key(0))
        return -10.0 * jnp.sum(batch.valid) * after.optimiser.mu

    estimates = jax.vmap(ascent, in_axes=1)({name: jnp.asarray(getattr(every, name)) for name in PER_ROW})
    return oracle.moments(oracle.probability(theta, BATCH), estimates)


# How much variance is left by a Q with so much noise, from the least to the most of five policies: the table of docs/algorithms.
LEFT = {
    "td": {0.0: (0.65, 0.85), 0.3: (0.70, 0.88), 5.0: (7.0, 16.0)},
    "monte_carlo": {0.0: (0.68, 0.88), 0.3: (0.72, 0.90), 5.0: (6.0, 15.0)},
}


@pytest.mark.parametrize("target", LEFT)
def test_a_control_variate_takes_variance_and_leaves_the_gradient_right_whatever_it_says(target):
    """The nearer to Q the less is left, and what is far from it is worse than nothing."""
    noise, left = np.random.default_rng(4).normal(size=(12, 2)), {size: [] for size in LEFT[target]}
    for seed in (1, 2, 3, 4, 5):
        theta = oracle.random_logits(DISCOUNTED, seed)
        mean, without = varied(Varied(target=target), theta, None)
        for size in (None, *left):
            mean, variance = varied(Varied(target=target), theta, None if size is None else size * noise)
            np.testing.assert_allclose(mean, oracle.objective_gradient(DISCOUNTED, theta), **TOLERANCE)
            if size is not None:
                left[size].append(float(variance / without))
    for size, (least, most) in LEFT[target].items():
        tolerance = 0.5 if size == 5.0 else 0.006
        np.testing.assert_allclose((min(left[size]), max(left[size])), (least, most), atol=tolerance)


ARM = EnvironmentSpec("arm", FLOATS, Box(-1.0, 1.0, (2,), np.float64), 1)
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(7)  # exact for polynomials of a normal variable up to degree 13


def earned(action):
    return 0.2 * action[..., 0] ** 2 - 0.1 * action[..., 0] * action[..., 1] - 0.5 * action[..., 0] + 0.7 * action[..., 1]


class Knowing(ActionCritic):
    """A critic that has nothing to learn."""

    def __call__(self, obs, action=None):
        return earned(action)


def of_normal_actions(config, action_critic):
    """(mean [D] of the ascent over all actions of a normal policy, its variance, the gradient of what it earns), by quadrature."""
    state = actor_critic.init(config, ARM, jax.random.key(0))
    flat, unravel = ravel_pytree(state.acting.actor)
    actor = unravel(flat + 0.3 * jax.random.normal(jax.random.key(6), flat.shape))
    state = state._replace(acting=StochasticPolicy(actor, None), action_critic=action_critic(state.action_critic))
    obs, place = jnp.asarray([[[0.3, -0.8, 0.5]]]), np.stack(np.meshgrid(NODES, NODES), axis=-1).reshape(-1, 2)
    prob = np.outer(WEIGHTS, WEIGHTS).ravel() / (2 * np.pi)

    def actions(actor):
        policy = actor.choose(actor.torso(obs[0, 0]), None)
        return policy.mean + jnp.exp(policy.log_std) * place

    one = part(experience(ARM, (1,)), 0, 1)._replace(obs=obs, terminated=np.ones((1, 1), bool), truncated=np.zeros((1, 1), bool))

    def ascent(action):
        rollout = jax.tree.map(jnp.asarray, one._replace(action=action[None, None], reward=earned(action)[None, None]))
        after, _ = actor_critic.update(config, state, rollout, None, jax.random.key(0))
        return -10.0 * after.optimiser.mu

    mean, variance = oracle.moments(prob, jax.jit(jax.vmap(ascent))(actions(actor)))
    gradient = jax.grad(lambda flat: prob @ earned(actions(unravel(flat))))(ravel_pytree(actor)[0])
    return mean, variance, gradient


def test_of_continuous_actions_it_is_q_to_first_order_at_the_mean():
    """Exact again for any Q, if it is no polynomial either; and of less variance where it resembles what is earned."""
    config = Plain(critic="both", control_variate=True, fit_first=False, num_steps=1, hidden=(4,))

    def unlike(critic):
        flat, unravel = ravel_pytree(critic)
        return unravel(3.0 * jax.random.normal(jax.random.key(2), flat.shape))

    def nothing(critic):
        return jax.tree.map(jnp.zeros_like, critic)

    def alike(critic):
        return Knowing(config, ARM, jax.random.key(3))

    variances = {}
    for action_critic in (unlike, nothing, alike):
        mean, variances[action_critic], gradient = of_normal_actions(config, action_critic)
        np.testing.assert_allclose(mean, gradient, **TOLERANCE)
    assert np.max(np.abs(gradient)) > 0.1
    assert variances[alike] < 0.75 * variances[nothing] < 0.75 * variances[unlike]


# Whole updates in loops, on batches of 8 rows of 2 environments


class Adam:
    def __init__(self, size):
        self.count, self.first, self.second = 0, np.zeros(size), np.zeros(size)

    def step(self, gradient):
        self.count += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient**2
        return self.first / (1 - 0.9**self.count) / (np.sqrt(self.second / (1 - 0.999**self.count)) + 1e-8)


class ByDefinition:
    """Tables of the actor and of the critics, moved as the paper's words say."""

    def __init__(self, config, state):
        self.config, self.theta = config, logits(state).copy()
        self.value = None if state.critic is None else np.array(state.critic.values)
        self.action_value = None if state.action_critic is None else np.array(state.action_critic.values)
        self.adam = {
            name: Adam(getattr(self, name).shape) for name in ("theta", "value", "action_value") if getattr(self, name) is not None
        }

    def probs(self, obs):
        return np.exp(self.theta[obs]) / np.exp(self.theta[obs]).sum()

    def value_at(self, obs):
        return self.value[obs] if self.value is not None else self.probs(obs) @ self.action_value[obs]

    def next_value(self, rollout, t, n):
        if rollout.terminated[t, n]:
            return 0.0
        if rollout.truncated[t, n]:
            return self.value_at(rollout.final_obs[t, n])
        return self.value_at(rollout.last_obs[n] if t == len(rollout.time) - 1 else rollout.obs[t + 1, n])

    def targets(self, rollout):
        target = np.zeros(rollout.time.shape)
        for t, n in reversed(list(np.ndindex(target.shape))):
            following = self.next_value(rollout, t, n)
            within = t < len(target) - 1 and not (rollout.terminated[t, n] or rollout.truncated[t, n])
            if self.config.target == "monte_carlo" and within:
                following = target[t + 1, n]
            target[t, n] = rollout.reward[t, n] + self.config.gamma * following
        return target

    def fit(self, rollout, target):
        for _ in range(self.config.critic_epochs):
            for name in ("value", "action_value"):
                table = getattr(self, name)
                if table is not None:
                    gradient = np.zeros(table.shape)
                    for row in np.ndindex(target.shape):
                        entry = (rollout.obs[row], rollout.action[row])[: table.ndim]
                        gradient[entry] += (table[entry] - target[row]) / target.size
                    table -= self.config.critic_learning_rate * self.adam[name].step(gradient)

    def advantages(self, rollout):
        advantage = np.zeros(rollout.time.shape)
        for t, n in np.ndindex(advantage.shape):
            obs = rollout.obs[t, n]
            one_step = rollout.reward[t, n] + self.config.gamma * self.next_value(rollout, t, n)
            of_action = one_step if self.action_value is None else self.action_value[obs, rollout.action[t, n]]
            advantage[t, n] = of_action - self.value_at(obs)
        return advantage

    def update(self, rollout):
        earlier, target = self.advantages(rollout), self.targets(rollout)
        self.fit(rollout, target)
        advantage, gradient = self.advantages(rollout) if self.config.fit_first else earlier, np.zeros(self.theta.shape)
        for row in np.ndindex(advantage.shape):
            score = -self.probs(rollout.obs[row])
            score[rollout.action[row]] += 1
            gradient[rollout.obs[row]] -= advantage[row] * score / advantage.size
        self.theta = self.theta - self.config.learning_rate * self.adam["theta"].step(gradient)
        return np.linalg.norm(gradient)

    @property
    def parameters(self):
        return np.concatenate([table.ravel() for table in (self.theta, self.value, self.action_value) if table is not None])


@pytest.mark.parametrize("fit_first", [True, False])
@pytest.mark.parametrize("target", ["td", "monte_carlo"])
@pytest.mark.parametrize("critic", CRITICS)
def test_updates_by_definition(critic, target, fit_first):
    config = Whole(critic=critic, target=target, fit_first=fit_first)
    state = first_state(config)
    expected = ByDefinition(config, state)
    for seed in (1, 2, 3):
        rollout = experience(SPEC, (3, 2), unfinished=3, seed=seed)
        norm = expected.update(rollout)
        state, metrics = update(config, state, rollout)
        np.testing.assert_allclose(parameters(state), expected.parameters, rtol=1e-7, atol=1e-7)
        np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-6)
    losses = {"value": {"value_loss"}, "action_value": {"action_value_loss"}, "both": {"value_loss", "action_value_loss"}}
    assert {name for name in metrics if name.endswith("value_loss")} == losses[critic]


@pytest.mark.parametrize("target", ["td", "monte_carlo"])
def test_online_one_td_error_moves_the_value_and_the_policy(target):
    """Sutton & Barto 2018, section 13.5, with the steps of Adam; at one step a Monte Carlo return is the TD target."""
    config = Online(target=target, gamma=0.9, learning_rate=0.1, critic_learning_rate=0.2)
    spec = table_spec(num_observations=5, num_actions=3, num_envs=1)
    state = first_state(config, spec=spec)
    stream = experience(spec, (3, 1, 2))
    expected = ByDefinition(config, state)
    for t in range(len(stream.time)):
        rollout = part(stream, t, t + 1)
        error = expected.advantages(rollout)[0, 0]
        np.testing.assert_allclose(expected.targets(rollout)[0, 0] - expected.value_at(rollout.obs[0, 0]), error, **TOLERANCE)
        expected.update(rollout)
        state, _ = update(config, state, rollout)
        np.testing.assert_allclose(parameters(state), expected.parameters, rtol=1e-7, atol=1e-7)


def test_a_value_without_a_critic_of_its_own_counts_legal_actions_alone():
    config = Whole(critic="action_value")
    state, rollout = first_state(config), experience(SPEC, (3, 2), unfinished=3)
    rng = np.random.default_rng(3)
    masks = (rng.random((2, ROWS, 2, 3)) < 0.5) | (np.arange(3) == 1)
    rollout = rollout._replace(action_mask=masks[0], final_action_mask=masks[1], last_action_mask=masks[1, 0])

    def value(obs, legal):
        probs = np.exp(logits(state)[obs]) * legal
        return probs @ np.asarray(state.action_critic.values)[obs] / probs.sum()

    inputs, features = observe(state.acting, jax.tree.map(jnp.asarray, rollout))
    judgement = judge(state.acting, None, state.action_critic, jax.tree.map(jnp.asarray, rollout), inputs, features)
    for t, n in np.ndindex(ROWS, 2):
        following = (rollout.final_obs[t, n], masks[1, t, n])
        if not (rollout.terminated[t, n] or rollout.truncated[t, n]):
            following = (rollout.obs[t + 1, n], masks[0, t + 1, n]) if t < ROWS - 1 else (rollout.last_obs[n], masks[1, 0, n])
        np.testing.assert_allclose(judgement.value[t, n], value(rollout.obs[t, n], masks[0, t, n]), **TOLERANCE)
        np.testing.assert_allclose(judgement.next_value[t, n], value(*following), **TOLERANCE)
        expected = state.action_critic.values[rollout.obs[t, n], rollout.action[t, n]]
        np.testing.assert_allclose(judgement.action_value[t, n], expected, **TOLERANCE)


def test_minibatches_of_the_critic_are_steps_of_their_own():
    whole, halves = (update(config, first_state(config), experience(SPEC, (5, 3)))[0] for config in (Whole(), Whole(minibatch_size=4)))
    assert (whole.critic_optimiser[0].count, halves.critic_optimiser[0].count) == (3, 12)


@pytest.mark.parametrize("critic", CRITICS)
def test_rows_of_a_reset_do_not_matter(critic):
    config, rollout = Whole(critic=critic), experience(SPEC, (3, 1), seed=5)
    plain, with_rows = (update(config, first_state(config), batches_of(stream, ROWS)[0]) for stream in (rollout, with_reset_rows(rollout)))
    np.testing.assert_allclose(parameters(with_rows[0]), parameters(plain[0]), **TOLERANCE)
    for name in plain[1]:
        np.testing.assert_allclose(with_rows[1][name], plain[1][name], **TOLERANCE, err_msg=name)
    assert np.max(np.abs(parameters(plain[0]) - parameters(first_state(config)))) > 0.1


def test_a_batch_of_nothing_but_a_reset_moves_nothing():
    """Not even by the momentum of earlier batches."""
    config = Online(critic="both")
    spec = table_spec(num_observations=5, num_actions=3, num_envs=1)
    stream = experience(spec, (1, 1))
    state, _ = update(config, first_state(config, spec=spec), part(stream, 0, 1))
    reset = part(stream, 1, 2)._replace(valid=np.zeros((1, 1), bool))
    after, _ = update(config, state, reset)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old, new)
    moved, _ = update(config, state, reset._replace(valid=np.ones((1, 1), bool)))
    assert np.max(np.abs(parameters(moved) - parameters(state))) > 1e-4


def test_the_policy_hears_of_what_the_critic_learns_of_the_batch_only_if_it_is_fitted_first():
    rollout = experience(SPEC, (5, 3))
    for fit_first in (False, True):
        configs = (Whole(fit_first=fit_first, critic_learning_rate=rate) for rate in (0.2, 0.02))
        afters = [logits(update(config, first_state(config), rollout)[0]) for config in configs]
        assert np.array_equal(*afters) != fit_first


@pytest.mark.parametrize("critic", CRITICS)
def test_the_audit_is_of_the_whole_step_in_units_of_reward(critic):
    config = Whole(normalise_reward=True, critic=critic, fit_first=False)
    state, rollout = first_state(config), experience(SPEC, (2, 3, 3))
    scale = state.return_scale
    state = state._replace(return_scale=scale._replace(moments=scale.moments._replace(variance=jnp.asarray(16.0))))
    after, metrics = update(config, state, rollout)
    scaled, by_definition = rollout._replace(reward=rollout.reward / 4.0), ByDefinition(config, state)
    advantage, target = by_definition.advantages(scaled), by_definition.targets(scaled)
    old, new = (Categorical.from_logits(one.acting.actor.logits[rollout.obs]) for one in (state, after))
    for name, value in step_audit(old, new, rollout, jnp.asarray(4.0 * advantage), discount=0.9).items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-7, err_msg=name)
    foreseen = values_of(state, rollout)[0] if critic == "value" else state.action_critic.values[rollout.obs, rollout.action]
    np.testing.assert_allclose(metrics["explained_variance"], 1 - np.var(target - foreseen) / np.var(target), rtol=1e-7)
    assert metrics["kl"] > 1e-6
    assert after.return_scale.moments.count == 16


# Networks


@pytest.mark.parametrize("memory", ["none", "gru"])
@pytest.mark.parametrize("critic", CRITICS)
def test_networks_learn_from_one_step_of_one_environment(critic, memory):
    config = ActorCritic(num_steps=1, critic=critic, memory=memory, memory_size=3, hidden=(4,), critic_epochs=1)
    spec = EnvironmentSpec("floats", Box(-np.inf, np.inf, (3,), np.float32), Discrete(3), 1)
    state = actor_critic.init(config, spec, jax.random.key(0))
    rollout = part(experience(spec, (2,)), 0, 1)._replace(carry=jnp.ones((1, 3)) if memory == "gru" else None)
    after, metrics = update(config, state, rollout)
    for name in ("acting", "critic", "action_critic"):
        before, now = getattr(state, name), getattr(after, name)
        assert (before is None) == ({"critic": "action_value", "action_critic": "value"}.get(name) == critic)
        if before is not None:
            assert any(np.any(x != y) for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(now), strict=True))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))
    assert np.isfinite(metrics["policy_loss"])
    if critic != "value":
        assert state.action_critic(jnp.ones(3), jnp.ones(3)).shape == (3,)


def init_with(space, **settings):
    return actor_critic.init(ActorCritic(**settings), EnvironmentSpec("floats", FLOATS, space, 1), jax.random.key(0))


@pytest.mark.parametrize("space", [Box(-1.0, 1.0, (2,)), MultiDiscrete([2, 3])], ids=["numbers", "choices"])
def test_where_a_mean_over_actions_is_needed_they_must_have_one(space):
    with pytest.raises(
        ValueError, match=r"a sum over all actions, which needs a Discrete action space, and this is .*; use critic='both' or"
    ):
        init_with(space, critic="action_value")
    with pytest.raises(ValueError, match=r"A critic that is given the action, as .* asks for, reads no memory; leave memory at 'none'"):
        init_with(space, critic="both", memory="gru")
    settings = {"critic": "both", "control_variate": True, "fit_first": False}
    if isinstance(space, Box):
        init_with(space, **settings)
    else:
        with pytest.raises(ValueError, match=r"control_variate=True needs the mean of Q.* and neither for MultiDiscrete\(\[2 3\]\)"):
            init_with(space, **settings)
    for critic in ("value", "both"):
        init_with(space, critic=critic)


@pytest.mark.parametrize("space", [Box(-1.0, 1.0, (2,)), MultiDiscrete([2, 3])], ids=["numbers", "choices"])
def test_a_critic_is_given_the_action_where_it_is_no_single_choice(space):
    """What is beyond the bounds is not told from the bound."""
    critic = init_with(space, critic="both", hidden=(4,)).action_critic
    obs, rng = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 3))), np.random.default_rng(1)
    if isinstance(space, Box):
        action = jnp.asarray(3.0 * rng.normal(size=(3, 2, 2)))
        value = taken_values(critic, obs, None, action)
        np.testing.assert_array_equal(value, taken_values(critic, obs, None, jnp.clip(action, -1.0, 1.0)))
        assert np.max(np.abs(action)) > 1
        seen = np.clip(action, -1.0, 1.0)
    else:
        action = jnp.asarray(rng.integers([2, 3], size=(3, 2, 2)))
        value = taken_values(critic, obs, None, action)
        seen = np.concatenate([np.eye(n)[np.asarray(action)[..., i]] for i, n in enumerate((2, 3))], axis=-1)
    layer, head = critic.features.layers.layers[0], critic.head
    # Dictionaries are in the order of their names: the action, then the observation.
    hidden = np.tanh(np.concatenate([seen, obs], axis=-1) @ np.asarray(layer.weight) + np.asarray(layer.bias))
    np.testing.assert_allclose(value, (hidden @ np.asarray(head.weight).T + np.asarray(head.bias))[..., 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("gamma", (0.0, 1.0), (-0.01, 1.01)),
        ("learning_rate", (1e-9,), (0.0,)),
        ("num_steps", (1,), (0,)),
        ("critic_epochs", (1,), (0,)),
        ("minibatch_size", (1, None), (0,)),
        ("critic_learning_rate", (1e-9,), (0.0,)),
    ],
)
def test_bounds(name, inside, outside):
    for value in inside:
        ActorCritic(**{name: value})
    for value in outside:
        with pytest.raises(ValueError, match=rf"^ActorCritic\.{name} must lie in"):
            ActorCritic(**{name: value})


def test_a_minibatch_that_does_not_divide_the_batch_is_refused():
    with pytest.raises(ValueError, match="minibatch_size=5 does not divide the batch of 8 steps x 2 environments = 16"):
        actor_critic.init(ActorCritic(num_steps=8, minibatch_size=5), SPEC, jax.random.key(0))
