"""What actor and critic make of a batch before they learn from it: the policy that acted, values and advantages."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .distributions import Distribution
from .math.returns import gae
from .normalise import ReturnScale, normalise
from .policies import Critic, Inputs, StochasticPolicy, distributions_of, features_after, features_of, inputs_of
from .types import Observation, Rollout


class Estimates(NamedTuple):
    """Of each row, [T, N, ...]; values and advantages in units of scaled rewards."""

    inputs: Inputs  # with the memory before each row
    features: jax.Array  # the actor's
    old: Distribution  # that acted
    value: jax.Array
    advantage: jax.Array
    value_target: jax.Array
    scale: jax.Array  # [] that rewards were divided by


def state_values(policy: StochasticPolicy, critic: Critic, rollout: Rollout, features: jax.Array) -> tuple[jax.Array, jax.Array]:
    """V(s) of every row and V of its true successor, both [T, N], by one pass of the critic over each observation."""

    def successor(obs: Observation, memory: jax.Array) -> jax.Array:
        """V of raw observations [N, ...] that follow what the actor remembers."""
        obs = normalise(policy.normaliser, obs)
        return jax.vmap(critic)(obs, features_after(policy.actor, obs, memory))

    values = jax.vmap(jax.vmap(critic))(normalise(policy.normaliser, rollout.obs), features)
    final_values = jax.vmap(successor)(rollout.final_obs, features)
    following = jnp.concatenate([values[1:], successor(rollout.last_obs, features[-1])[None]])
    return values, jnp.where(rollout.terminated | rollout.truncated, final_values, following)


def estimate(config: Any, policy: StochasticPolicy, critic: Critic, return_scale: ReturnScale | None, rollout: Rollout) -> Estimates:
    """Generalised advantage estimates (Schulman et al. 2016, eq. 16) with `config.gamma` and `config.gae_lambda`."""
    scale = return_scale.scale() if return_scale is not None else jnp.ones(())
    inputs = inputs_of(policy, rollout)
    features = features_of(policy.actor, inputs)
    inputs = inputs._replace(carry=jax.tree.map(lambda first: jnp.concatenate([first, features[:-1]]), inputs.carry))
    value, next_value = state_values(policy, critic, rollout, features)
    flags = rollout.terminated, rollout.truncated
    advantage = gae(rollout.reward / scale, value, next_value, *flags, discount=config.gamma, gae_lambda=config.gae_lambda)
    return Estimates(inputs, features, distributions_of(policy.actor, inputs), value, advantage, advantage + value, scale)
