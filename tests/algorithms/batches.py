"""What the shipped losses and updates are driven with: the oracle's trajectories as rollouts, tables as policies, made-up experience."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium.spaces import Box, Discrete

from surefoot.distributions import Categorical
from surefoot.estimates import state_values
from surefoot.normalise import normalise
from surefoot.policies import Inputs, distributions_of, features_of, inputs_of
from surefoot.types import EnvironmentSpec, Rollout

FLOATS = Box(-np.inf, np.inf, (3,), np.float32)


class Table(eqx.Module):
    """An actor: logits [S, A] by state. An observation is the number time * S + state."""

    logits: jax.Array
    memory: None = None

    def torso(self, obs):
        return self.logits[obs % len(self.logits)]

    def choose(self, features, action_mask):
        return Categorical.from_logits(features, action_mask)


class ValueTable(eqx.Module):
    """A critic: a value for each observation, [(H + 1) * S]."""

    values: jax.Array

    def __call__(self, obs, features):
        return self.values[obs]


def inputs(obs, action_mask=None):
    """What a policy without a memory is given of rows [T, N]."""
    return Inputs(obs, action_mask, np.zeros(np.shape(obs)[:2], np.int32), None)


def distribution(policy, obs):
    """Over the actions at raw observations [T, N, ...]."""
    return distributions_of(policy.actor, inputs(normalise(policy.normaliser, obs)))


def values_of(state, rollout):
    """(V of each row, V of its successor) by the critic of a learner without a memory."""
    rollout = jax.tree.map(jnp.asarray, rollout)
    return state_values(state.acting, state.critic, rollout, features_of(state.acting.actor, inputs_of(state.acting, rollout)))


def table_spec(num_observations, num_actions, num_envs):
    return EnvironmentSpec("table", Discrete(num_observations), Discrete(num_actions), num_envs)


def oracle_rollout(mdp, batch):
    """Every trajectory [H, N] as the stream of an environment."""
    num_states = len(mdp.start)
    following = ((batch.time + 1) * num_states + batch.next_state).astype(np.int32)
    return Rollout(
        obs=(batch.time * num_states + batch.state).astype(np.int32),
        action=batch.action.astype(np.int32),
        reward=batch.reward,
        terminated=batch.terminated,
        truncated=batch.truncated,
        final_obs=following,
        valid=batch.valid,
        time=batch.time.astype(np.int32),
        last_obs=following[-1],
        progress=np.float32(0.0),
    )


def experience(spec, lengths=(3, 1, 5, 2, 4, 1), *, begun=0, unfinished=0, seed=0):
    """Random rows of `spec.num_envs` streams, each of episodes of these `lengths` in an order of its own.

    The first has `begun` so many steps earlier and the last goes on after the batch, of which it is `unfinished` rows. Every end
    is a termination or a truncation; random observations stand everywhere.
    """
    rng = np.random.default_rng(seed)
    num_steps, num_envs = sum(lengths) + unfinished, spec.num_envs

    def observations(*shape):
        if isinstance(spec.observation_space, Discrete):
            return rng.integers(spec.observation_space.n, size=shape, dtype=np.int32)
        return rng.normal(size=(*shape, 3))

    time, ended = np.zeros((2, num_steps, num_envs), np.int32)
    for n in range(num_envs):
        end = 0
        for length in [*rng.permutation(lengths), unfinished]:
            time[end : end + length, n] = np.arange(length) + (begun if end == 0 else 0)
            end += length
            ended[end - 1, n] = True
        if unfinished:
            ended[-1, n] = False
    terminates = rng.random((num_steps, num_envs)) < 0.5
    discrete = isinstance(spec.action_space, Discrete)
    return Rollout(
        obs=observations(num_steps, num_envs),
        action=rng.integers(spec.action_space.n, size=(num_steps, num_envs), dtype=np.int32)
        if discrete
        else rng.normal(size=(num_steps, num_envs, *spec.action_space.shape)),
        reward=rng.normal(size=(num_steps, num_envs)),
        terminated=ended.astype(bool) & terminates,
        truncated=ended.astype(bool) & ~terminates,
        final_obs=observations(num_steps, num_envs),
        valid=np.ones((num_steps, num_envs), bool),
        time=time,
        last_obs=observations(num_envs),
        progress=np.float32(0.0),
    )


PER_ROW = ("obs", "action", "reward", "terminated", "truncated", "final_obs", "valid", "time")


def part(rollout, begin, end):
    """The batch of the rows from `begin` to `end`."""
    rows = {name: getattr(rollout, name)[begin:end] for name in PER_ROW}
    last_obs = rollout.last_obs if end == len(rollout.time) else rollout.obs[end]
    return rollout._replace(**rows, last_obs=last_obs)


def batches_of(rollout, num_rows, offset=0):
    """The experience in batches of `num_rows`, with `offset` rows that do not count before it and what is missing after it."""
    length = len(rollout.time)
    missing = -(length + offset) % num_rows
    padding = experience_like(rollout, seed=2)
    index = np.array([*range(offset), *range(length), *range(missing)])
    is_real = np.array([False] * offset + [True] * length + [False] * missing)
    rows = {}
    for name in PER_ROW:
        real, wild = getattr(rollout, name)[index % length], getattr(padding, name)[index % length]
        rows[name] = np.where(is_real.reshape(-1, *[1] * (real.ndim - 1)), real, wild)
    padded = rollout._replace(**rows)
    return [part(padded, begin, begin + num_rows) for begin in range(0, len(index), num_rows)]


def with_reset_rows(rollout, seed=1):
    """The same experience in NEXT_STEP mode: a row that counts for nothing, of wild contents, after every row that ended an episode.

    Every stream must have the same number of ends.
    """
    other = experience_like(rollout, seed)
    ended = rollout.terminated | rollout.truncated
    columns = []
    for n in range(ended.shape[1]):
        order = [row for t in range(len(ended)) for row in ([(t, True), (t, False)] if ended[t, n] else [(t, True)])]
        columns.append(
            {name: np.stack([(getattr(rollout, name) if real else getattr(other, name))[t, n] for t, real in order]) for name in PER_ROW}
        )
    return rollout._replace(**{name: np.stack([column[name] for column in columns], axis=1) for name in PER_ROW})


def experience_like(rollout, seed):
    """Rows that are not valid, in the shapes of `rollout`."""
    rng, never = np.random.default_rng(seed), np.zeros_like(rollout.valid)
    mixed = {name: rng.permuted(getattr(rollout, name), axis=0) for name in ("obs", "action", "final_obs")}
    zero = {"terminated": never, "truncated": never, "valid": never, "time": np.zeros_like(rollout.time)}
    return rollout._replace(**mixed, **zero, reward=np.full_like(rollout.reward, 99.0))


# What learns from a replay


def unconnected(obs, action, reward, terminated, following, *, progress=0.0, mask=None, next_mask=None):
    """Transitions [T, N] that have nothing to do with each other: each ends its episode, by truncation where it goes on."""
    terminated = np.asarray(terminated, bool)
    return Rollout(
        obs=obs,
        action=action,
        reward=np.asarray(reward, np.float32),
        terminated=terminated,
        truncated=~terminated,
        final_obs=following,
        valid=np.ones_like(terminated),
        time=np.zeros(terminated.shape, np.int32),
        last_obs=obs[-1],
        progress=np.float32(progress),
        action_mask=mask,
        final_action_mask=next_mask,
        last_action_mask=None if mask is None else mask[-1],
    )


class Adam:
    """Adam of one vector, by its definition."""

    def __init__(self, *, eps=1e-5):
        self.first, self.second, self.count, self.eps = 0.0, 0.0, 0, eps

    def __call__(self, gradient):
        """The direction of the step."""
        self.count += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient**2
        return self.first / (1 - 0.9**self.count) / (np.sqrt(self.second / (1 - 0.999**self.count)) + self.eps)


def best_values(following, reward, terminated, gamma):
    """Q* [S, A] of a deterministic problem, by iteration."""
    q = np.zeros(np.shape(reward))
    for _ in range(2000):
        q = reward + gamma * np.where(terminated, 0.0, np.max(q, axis=1)[following])
    return q


# Four states, two actions: where they lead, what they pay, and which of them end the episode.
FOLLOWING = np.array([[1, 2], [0, 3], [3, 0], [2, 3]])
PAID = np.array([[0.0, 0.3], [0.2, -0.5], [1.0, 0.1], [-0.2, 0.6]])
ENDS = np.array([[False, False], [False, False], [True, False], [False, True]])


def every_pair(progress=0.0):
    """All eight pairs of state and action, as one step of eight streams."""
    state, action = (x.ravel()[None].astype(np.int32) for x in np.indices((4, 2)))
    return unconnected(state, action, PAID.ravel()[None], ENDS.ravel()[None], FOLLOWING.ravel()[None].astype(np.int32), progress=progress)
