"""Probe environments: six tasks of a few steps, each with one way to fail it.

A learner that passes all six is wired correctly from observation to bootstrap; the first probe it fails names the fault.
V is the value it should arrive at (of the best action), gamma the discount, and no reward exceeds 1.

| probe       | reward                 | ends        | V               | what a broken learner shows                                  |
| ----------- | ---------------------- | ----------- | --------------- | ------------------------------------------------------------ |
| CONSTANT    | 1                      | at step 1   | 1               | 0: no gradient; 1 / (1 - gamma): terminal states bootstrap   |
| OBSERVATION | the observation, +-1   | at step 1   | the observation | 0 for both: the critic is blind, or rows are mispaired       |
| DELAYED     | 0, then 1              | at step 2   | gamma, then 1   | first V 0: nothing flows back in time; 1: no discount        |
| ACTION      | nearness to a target   | at step 1   | 1               | the action stays random: no gradient; V = -1: wrong sign     |
| BOTH        | same; obs picks target | at step 1   | 1               | one action for both: the actor is blind, or rows mispaired   |
| TRUNCATION  | 1                      | time limit  | 1 / (1 - gamma) | less: truncation is taken for termination; more: no discount |
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium.spaces import Box, Discrete

TARGET = 0.5  # the best continuous action; off centre, so that a policy which begins at zero has to learn it


class ProbeId(IntEnum):
    """Which probe; in the order in which a new learner should try them."""

    CONSTANT = 0
    OBSERVATION = 1
    DELAYED = 2
    ACTION = 3
    BOTH = 4
    TRUNCATION = 5


def as_probe_id(probe_id: int | jax.Array) -> jax.Array:
    """int32, so that every probe has one type and a jitted function compiles once for all of them."""
    if isinstance(probe_id, int | np.integer) and probe_id not in range(len(ProbeId)):
        known = ", ".join(f"{probe.value} ({probe.name})" for probe in ProbeId)
        raise ValueError(f"there is no probe {probe_id}; choose one of {known}")
    return jnp.asarray(probe_id, jnp.int32)


class Probe(eqx.Module):
    """A `DeviceEnvironment` whose `probe_id` is a traced leaf: pass it as an argument to a jitted function, do not close over it.

    The discrete form has two actions, right (reward 1) or wrong (-1). The continuous form pays 1 - (action - target)^2.
    """

    probe_id: jax.Array = eqx.field(converter=as_probe_id)
    continuous: bool = eqx.field(default=False, static=True)

    max_episode_steps = 8

    @property
    def name(self) -> str:
        return "probe-continuous" if self.continuous else "probe"

    @property
    def observation_space(self) -> Box:
        return Box(-1.0, 1.0, (1,), np.float32)

    @property
    def action_space(self) -> Box | Discrete:
        return Box(-1.0, 1.0, (1,), np.float32) if self.continuous else Discrete(2)

    def reset(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """state = observation [1]: 1 or -1 with equal chance where the probe looks at it, else 0."""
        sign = jax.random.rademacher(key, (1,), jnp.float32)
        shows_sign = (self.probe_id == ProbeId.OBSERVATION) | (self.probe_id == ProbeId.BOTH)
        obs = jnp.where(shows_sign, sign, 0.0)
        return obs, obs

    def step(self, state: jax.Array, action: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """`DELAYED` observes 0, then 1; every other probe stays where it is, so that a false bootstrap at its end is seen."""
        seen = state[0]
        side = jnp.where(self.probe_id == ProbeId.BOTH, seen, 1.0)
        match = 1.0 - (action[0] - TARGET * side) ** 2 if self.continuous else jnp.where(action == 1, side, -side)
        reward = jnp.stack([1.0, seen, seen, match, match, 1.0])[self.probe_id]  # in the order of ProbeId

        delayed = self.probe_id == ProbeId.DELAYED
        obs = jnp.where(delayed, 1.0, state)
        terminated = jnp.where(delayed, seen == 1.0, self.probe_id != ProbeId.TRUNCATION)
        return obs, obs, reward, terminated


class Expectation(NamedTuple):
    """What a correct learner arrives at, for each of the S observations that a probe shows."""

    obs: np.ndarray  # [S, 1] float32
    value: np.ndarray  # [S] float32, under the best action
    action: np.ndarray | None  # [S] int64, or [S, 1] float32 in the continuous form; None where every action is as good


def expectation(probe_id: int, gamma: float, *, continuous: bool = False) -> Expectation:
    """The exact optimum of a probe under discount `gamma` in [0, 1), for a criterion without entropy."""
    if not 0 <= gamma < 1:
        raise ValueError(f"gamma is {gamma}; the probes need 0 <= gamma < 1, for the truncated one has no finite value at 1")
    obs, value, best_side = {
        ProbeId.CONSTANT: ([0.0], [1.0], None),
        ProbeId.OBSERVATION: ([-1.0, 1.0], [-1.0, 1.0], None),
        ProbeId.DELAYED: ([0.0, 1.0], [gamma, 1.0], None),
        ProbeId.ACTION: ([0.0], [1.0], [1.0]),
        ProbeId.BOTH: ([-1.0, 1.0], [1.0, 1.0], [-1.0, 1.0]),
        ProbeId.TRUNCATION: ([0.0], [1 / (1 - gamma)], None),
    }[ProbeId(probe_id)]
    action = None
    if best_side is not None:
        side = np.array(best_side, np.float32)
        action = TARGET * side[:, None] if continuous else (side > 0).astype(np.int64)
    return Expectation(np.array(obs, np.float32)[:, None], np.array(value, np.float32), action)
