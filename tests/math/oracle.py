"""Tabular finite-horizon MDPs, small enough to enumerate every trajectory: the expectation of an estimator is a sum.

The horizon is finite, so that values depend on time, and reaching it is a termination. A policy is a table of logits,
theta [S, A], the same at all times. Notation: S states, A actions, H the horizon, N trajectories, D = S * A parameters.
"""

from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


@dataclass(frozen=True, eq=False)  # compared by identity: compiled functions take it as static
class MDP:
    transition: np.ndarray  # [S, A, S] probability of each successor
    reward: np.ndarray  # [S, A, S]
    start: np.ndarray  # [S] probability
    terminal: np.ndarray  # [S] bool: entering such a state ends the episode
    horizon: int
    discount: float


class Trajectories(NamedTuple):
    """All trajectories of an MDP, stream n holding the n-th: the time-major layout that the shipped functions take.

    An episode that ends before the horizon leaves its stream with invalid rows, all zero.
    """

    state: np.ndarray  # [H, N] int
    action: np.ndarray  # [H, N] int
    reward: np.ndarray  # [H, N]
    next_state: np.ndarray  # [H, N] int
    terminated: np.ndarray  # [H, N] bool
    truncated: np.ndarray  # [H, N] bool, all false
    valid: np.ndarray  # [H, N] bool
    time: np.ndarray  # [H, N] int
    environment_prob: np.ndarray  # [N] what start and transitions give to the probability; the policy gives the rest


def compiled(function, *arrays, **options):
    """Call a function as production does: compiled as a whole."""
    return jax.jit(partial(function, **options))(*arrays)


def random_mdp(seed, *, num_states=3, num_actions=2, horizon=3, discount=0.9, num_terminal=1):
    """Random transitions and positive rewards; the last `num_terminal` states are terminal and never started in."""
    rng = np.random.default_rng(seed)
    terminal = np.arange(num_states) >= num_states - num_terminal
    start = np.where(terminal, 0.0, rng.dirichlet(np.ones(num_states)))
    return MDP(
        transition=rng.dirichlet(np.ones(num_states), size=(num_states, num_actions)),
        reward=rng.uniform(0.0, 2.0, size=(num_states, num_actions, num_states)),
        start=start / start.sum(),
        terminal=terminal,
        horizon=horizon,
        discount=discount,
    )


def random_logits(mdp, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=mdp.reward.shape[:2]))


def trajectories(mdp):
    """Enumerate every trajectory that has any probability under a policy that has none equal to 0."""
    num_states, num_actions, _ = mdp.transition.shape
    complete = []

    def extend(rows, state, prob):
        time = len(rows)
        for action, successor in product(range(num_actions), range(num_states)):
            step_prob = prob * mdp.transition[state, action, successor]
            if step_prob == 0:
                continue
            terminated = bool(mdp.terminal[successor]) or time + 1 == mdp.horizon
            row = (state, action, mdp.reward[state, action, successor], successor, terminated, False, True, time)
            if terminated:
                invalid = [(0, 0, 0.0, 0, False, False, False, 0)] * (mdp.horizon - time - 1)
                complete.append(([*rows, row, *invalid], step_prob))
            else:
                extend([*rows, row], successor, step_prob)

    for state in np.flatnonzero(mdp.start):
        extend([], state, mdp.start[state])
    columns = [np.array(column).T for column in zip(*(zip(*rows, strict=True) for rows, _ in complete), strict=True)]
    return Trajectories(*columns, environment_prob=np.array([prob for _, prob in complete]))


def log_policy(theta):
    """[S, A]"""
    return jax.nn.log_softmax(theta)


@partial(jax.jit, static_argnums=0)
def values(mdp, theta):
    """V [H + 1, S] and Q [H, S, A] by dynamic programming; V is 0 at the horizon and in terminal states."""
    policy, alive = jnp.exp(log_policy(theta)), ~mdp.terminal
    value, action_value = [jnp.zeros(len(mdp.start))], []
    for _ in range(mdp.horizon):
        action_value.insert(0, jnp.sum(mdp.transition * (mdp.reward + mdp.discount * value[0]), axis=-1))
        value.insert(0, alive * jnp.sum(policy * action_value[0], axis=-1))
    return jnp.stack(value), jnp.stack(action_value)


@partial(jax.jit, static_argnums=0)
def objective(mdp, theta):
    """J: the expected value of the start state."""
    return mdp.start @ values(mdp, theta)[0][0]


@partial(jax.jit, static_argnums=0)
def objective_gradient(mdp, theta):
    """[D]"""
    return jax.grad(lambda theta: objective(mdp, theta))(theta).ravel()


@partial(jax.jit, static_argnums=0)
def state_distribution(mdp, theta):
    """[H, S] probability of acting in a state at a time; rows sum to the probability that the episode still goes on."""
    policy, alive = jnp.exp(log_policy(theta)), ~mdp.terminal
    distribution = [jnp.asarray(mdp.start)]
    for _ in range(mdp.horizon - 1):
        distribution.append(alive * jnp.einsum("s,sa,sax->x", distribution[-1], policy, mdp.transition))
    return jnp.stack(distribution)


@partial(jax.jit, static_argnums=0)
def expected_kl(mdp, old, new):
    """Mean over the steps that `old` takes of KL(old || new)."""
    kl = jnp.sum(jnp.exp(log_policy(old)) * (log_policy(old) - log_policy(new)), axis=-1)
    distribution = state_distribution(mdp, old)
    return jnp.sum(distribution @ kl) / jnp.sum(distribution)


@jax.jit
def log_prob(theta, batch):
    """[H, N] of the actions taken; 0 in invalid rows."""
    return jnp.where(batch.valid, log_policy(theta)[batch.state, batch.action], 0.0)


@jax.jit
def probability(theta, batch):
    """[N] of each trajectory under the policy."""
    return batch.environment_prob * jnp.exp(jnp.sum(log_prob(theta, batch), axis=0))


@jax.jit
def row_values(value, batch):
    """V of the state of each row and of its successor, both [H, N], from V [H + 1, S]."""
    return value[batch.time, batch.state], value[batch.time + 1, batch.next_state]


@partial(jax.jit, static_argnums=0)
def row_advantages(mdp, theta, batch):
    """Exact Q - V of each row, [H, N]."""
    value, action_value = values(mdp, theta)
    return action_value[batch.time, batch.state, batch.action] - value[batch.time, batch.state]


def gradient_estimates(loss, theta, valid):
    """What each trajectory says that the gradient of J is, [N, D]: descent on the elementwise `loss`(theta) [H, N] of its rows."""

    def ascent(theta):
        return -jnp.sum(jnp.where(valid, loss(theta), 0.0), axis=0)

    jacobian = jax.jit(jax.jacfwd(ascent))(theta)
    return jacobian.reshape(len(jacobian), -1)


@jax.jit
def moments(prob, estimates):
    """Mean [D] of estimates [N, D] and the trace of their covariance."""
    mean = prob @ estimates
    return mean, prob @ jnp.sum((estimates - mean) ** 2, axis=-1)


def independent_draws(prob, num_draws):
    """All batches of independent draws from N outcomes: indices [N^num_draws, num_draws] and the probability of each batch."""
    index = np.array(list(product(range(len(prob)), repeat=num_draws)))
    return index, np.prod(np.asarray(prob)[index], axis=-1)
