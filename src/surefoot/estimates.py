"""What actor and critic make of a batch before they learn from it: the policy that acted, values and advantages."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .distributions import Distribution
from .math.returns import gae
from .normalise import ReturnScale, normalise
from .policies import Critic, Inputs, StochasticPolicy, distributions_of, features_of, inputs_of, remember
from .types import Observation, Rollout


class Estimates(NamedTuple):
    """Of each row, [T, N, ...]; values and advantages in units of scaled rewards."""

    inputs: Inputs
    features: jax.Array | None  # the actor's, where the critic reads them
    old: Distribution  # that acted
    value: jax.Array
    advantage: jax.Array
    value_target: jax.Array
    scale: jax.Array  # [] that rewards were divided by


def state_values(
    config: Any, policy: StochasticPolicy, critic: Critic, rollout: Rollout, features: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """V(s) of every row and V of its true successor, both [T, N], by one pass of the critic over each observation."""

    def value(obs: Observation, features: jax.Array | None) -> jax.Array:
        """Of normalised observations [N, ...] with the actor's features."""
        return jax.vmap(critic)(obs, features)

    def successor(obs: Observation, memory: jax.Array | None) -> jax.Array:
        """Of raw observations [N, ...] that follow what the actor remembers."""
        obs = normalise(policy.normaliser, obs)
        if config.memory != "none":
            return value(obs, remember(policy.actor, obs, memory))
        return value(obs, jax.vmap(policy.actor.torso)(obs) if config.shared_trunk else None)

    values = jax.vmap(value)(normalise(policy.normaliser, rollout.obs), features)
    final_values = jax.vmap(successor)(rollout.final_obs, features)
    last = successor(rollout.last_obs, None if features is None else features[-1])
    following = jnp.concatenate([values[1:], last[None]])
    return values, jnp.where(rollout.terminated | rollout.truncated, final_values, following)


def estimate(config: Any, policy: StochasticPolicy, critic: Critic, return_scale: ReturnScale | None, rollout: Rollout) -> Estimates:
    """Generalised advantage estimates (Schulman et al. 2016, eq. 16) with `config.gamma` and `config.gae_lambda`."""
    scale = return_scale.scale() if return_scale is not None else jnp.ones(())
    inputs = inputs_of(policy, rollout)
    features = features_of(config, policy.actor, inputs)
    if config.memory != "none":  # before each row, for sequences that begin there
        inputs = inputs._replace(carry=jnp.concatenate([inputs.carry, features[:-1]]))
    value, next_value = state_values(config, policy, critic, rollout, features)
    flags = rollout.terminated, rollout.truncated
    advantage = gae(rollout.reward / scale, value, next_value, *flags, discount=config.gamma, gae_lambda=config.gae_lambda)
    old = distributions_of(config, policy.actor, inputs)
    return Estimates(inputs, features, old, value, advantage, advantage + value, scale)
