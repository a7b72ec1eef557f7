"""Q-learning in a table: after every step the value of what was done moves towards the reward and the best that can follow.

Watkins 1989; Watkins & Dayan 1992 (Machine Learning 8), eq. 1; Sutton & Barto 2018, eq. 6.8. Actions are the best of the table,
equal ones at random, and now and then any. Several environments write into one table, one row after the other. Left out: traces.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from ..config import check_bounds, configuration
from ..math.reduce import masked_mean
from ..math.values import max_value, td_target
from ..minibatches import scheduled
from ..spaces import uniform_choice
from ..types import EnvironmentSpec, Observation, PyTree, Rollout

MAX_ENTRIES = 100_000_000


@configuration
class QLearning:
    """Q-learning in a table, for discrete observations."""

    gamma: float = 0.99
    """Discount factor."""
    num_steps: int = 8
    """Steps of each environment between two visits to the table."""
    learning_rate: float = 0.1
    """How far a value moves towards its target, from 0 to 1."""
    learning_rate_schedule: Literal["constant", "linear"] = "constant"
    """Keep `learning_rate`, or let it fall linearly to 0 over the run."""
    initial_value: float = 0.0
    """Of every entry; above all that can be earned, it makes the learner try everything."""
    exploration_fraction: float = 0.5
    """Part of the run over which the probability of a random action falls from 1 to `final_epsilon`."""
    final_epsilon: float = 0.05
    """Probability of a random action from then on."""

    def __post_init__(self) -> None:
        check_bounds(self, gamma="[0, 1]", num_steps="[1, inf)", learning_rate="(0, 1]")
        check_bounds(self, initial_value="(-inf, inf)", exploration_fraction="(0, 1]", final_epsilon="[0, 1]")


class Acting(NamedTuple):
    """What acting needs."""

    table: jax.Array  # [..., A], an axis for each part of the observation, all of them counted from 0
    epsilon: jax.Array  # [] probability of a random action
    first: tuple[jax.Array, ...]  # the number that each part of an observation begins with


class State(NamedTuple):
    """Everything that learning changes."""

    acting: Acting


def init(config: QLearning, spec: EnvironmentSpec, key: jax.Array) -> State:
    """A table of equal values; ValueError where observations or actions cannot be counted."""
    parts = parts_of(spec.observation_space)
    if parts is None or not isinstance(spec.action_space, gymnasium.spaces.Discrete):
        raise ValueError(
            f"A table needs discrete observations and a Discrete action space, and these are {spec.observation_space} and "
            f"{spec.action_space}; take dqn for other observations, ppo for other actions."
        )
    sizes, first = zip(*parts, strict=True)
    shape = *sizes, int(spec.action_space.n)
    if math.prod(shape) > MAX_ENTRIES:
        raise ValueError(f"A table of {' x '.join(map(str, shape))} has more than {MAX_ENTRIES:,} entries; take dqn.")
    table = jnp.full(shape, config.initial_value, float)
    return State(Acting(table, jnp.ones(()), tuple(jnp.asarray(number, jnp.int32) for number in first)))


def parts_of(space: gymnasium.Space[Any]) -> list[tuple[int, int]] | None:
    """(how many, the first number) of each part of a discrete space, in the order of its leaves; None where it is not discrete."""
    if isinstance(space, gymnasium.spaces.Dict):
        several = [parts_of(part) for _, part in sorted(space.spaces.items())]  # the order of a pytree
        return None if None in several else [part for parts in several if parts for part in parts]
    if isinstance(space, gymnasium.spaces.Discrete):
        return [(int(space.n), int(space.start))]
    if isinstance(space, gymnasium.spaces.MultiDiscrete):
        return list(zip(space.nvec.ravel().tolist(), np.ravel(space.start).tolist(), strict=True))
    return [(2, 0)] * int(np.prod(space.shape)) if isinstance(space, gymnasium.spaces.MultiBinary) else None


def place(first: tuple[jax.Array, ...], obs: Observation) -> tuple[jax.Array, ...]:
    """Where in the table observations [N, ...] stand: an index [N] for each of its axes."""
    leaves = [leaf.reshape(leaf.shape[0], -1).astype(jnp.int32) for leaf in jax.tree.leaves(obs)]
    columns = jnp.concatenate(leaves, axis=1)
    return tuple(columns[:, i] - number for i, number in enumerate(first))


def act(config: QLearning, acting: Acting, obs: Observation, action_mask: Any, carry: PyTree, key: Any) -> tuple[jax.Array, PyTree]:
    """One action for each of N streams: the best, or now and then a random one; always the first of the best without a `key`."""
    values = acting.table[place(acting.first, obs)]
    if action_mask is not None:
        values = jnp.where(action_mask, values, -jnp.inf)
    if key is None:
        return jnp.argmax(values, axis=-1).astype(jnp.int32), carry
    explore_key, choice_key = jax.random.split(key)
    equal = values == jnp.max(values, axis=-1, keepdims=True)
    legal = jnp.ones_like(equal) if action_mask is None else action_mask
    explores = jax.random.uniform(explore_key, equal.shape[:1]) < acting.epsilon
    return uniform_choice(choice_key, equal.shape, jnp.where(explores[:, None], legal, equal)), carry


def update(config: QLearning, state: State, rollout: Rollout, frozen: None, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
    """Every row of a rollout [T, N] in turn: Q(s, a) <- Q(s, a) + alpha (r + gamma max_b Q(s', b) - Q(s, a))."""
    table, _, first = state.acting
    rate = scheduled(config.learning_rate, config.learning_rate_schedule, rollout.progress)
    ended = rollout.terminated | rollout.truncated

    def following(rows: Any, last: Any, final: Any) -> jax.Array:
        after = jnp.concatenate([rows[1:], last[None]])
        return jnp.where(ended.reshape(*ended.shape, *[1] * (after.ndim - 2)), final, after)

    successor = jax.tree.map(following, rollout.obs, rollout.last_obs, rollout.final_obs)
    next_mask = None
    if rollout.action_mask is not None:
        next_mask = following(rollout.action_mask, rollout.last_action_mask, rollout.final_action_mask)
    rows = rollout.obs, rollout.action, rollout.reward, successor, rollout.terminated, rollout.valid, next_mask

    def step(table: jax.Array, row: Any) -> tuple[jax.Array, jax.Array]:
        obs, action, reward, successor, terminated, valid, mask = jax.tree.map(lambda x: x[None], row)
        where = *place(first, obs), action
        target = td_target(reward, max_value(table[place(first, successor)], mask), terminated, discount=config.gamma)
        error = jnp.where(valid, target - table[where], 0.0)
        return table.at[where].add(rate * error), jnp.abs(error[0])

    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
    table, error = jax.lax.scan(step, table, flat)
    epsilon = jnp.maximum(1.0 - (1.0 - config.final_epsilon) * rollout.progress / config.exploration_fraction, config.final_epsilon)
    metrics = {"td_error": masked_mean(error, rollout.valid.ravel()), "epsilon": epsilon, "learning_rate": jnp.asarray(rate)}
    return State(Acting(table, epsilon, first)), metrics
