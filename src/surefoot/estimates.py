"""What actor and critic make of a batch before they learn from it: the policy that acted, values and advantages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .distributions import Distribution
from .math.reduce import standardise
from .math.returns import gae, time_discount
from .networks import over_rows
from .normalise import ReturnScale, normalise
from .policies import Critic, Inputs, StochasticPolicy, distributions_of, features_after, features_of, inputs_of
from .types import Array, Observation, Rollout

Evaluate = Callable[[Observation, jax.Array, Any], jax.Array]  # (obs, features, action_mask) of one row


class Estimates(NamedTuple):
    """Of each row, [T, N, ...]; values and advantages in units of scaled rewards."""

    inputs: Inputs  # with the memory before each row
    features: jax.Array  # the actor's
    old: Distribution  # that acted
    value: jax.Array
    advantage: jax.Array
    value_target: jax.Array
    scale: jax.Array  # [] that rewards were divided by


def observe(policy: StochasticPolicy, rollout: Rollout) -> tuple[Inputs, jax.Array]:
    """The inputs of a rollout, with the memory before each row, and the actor's features."""
    inputs = inputs_of(policy, rollout)
    features = features_of(policy.actor, inputs)
    return inputs._replace(carry=jax.tree.map(lambda first: jnp.concatenate([first, features[:-1]]), inputs.carry)), features


def rows_and_successors(evaluate: Evaluate, policy: StochasticPolicy, rollout: Rollout, features: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`evaluate(obs, features, action_mask)` of every row and of its true successor, both [T, N], once for each observation."""

    def successor(obs: Observation, memory: jax.Array, action_mask: Any) -> jax.Array:
        """Of raw observations [N, ...] that follow what the actor remembers."""
        obs = normalise(policy.normaliser, obs)
        return jax.vmap(evaluate)(obs, features_after(policy.actor, obs, memory), action_mask)

    values = over_rows(evaluate, normalise(policy.normaliser, rollout.obs), features, rollout.action_mask)
    final_values = jax.vmap(successor)(rollout.final_obs, features, rollout.final_action_mask)
    following = jnp.concatenate([values[1:], successor(rollout.last_obs, features[-1], rollout.last_action_mask)[None]])
    return values, jnp.where(rollout.terminated | rollout.truncated, final_values, following)


def state_values(policy: StochasticPolicy, critic: Critic, rollout: Rollout, features: jax.Array) -> tuple[jax.Array, jax.Array]:
    """V(s) of every row and V of its true successor, both [T, N]."""
    return rows_and_successors(lambda obs, features, _: critic(obs, features), policy, rollout, features)


def estimate(config: Any, policy: StochasticPolicy, critic: Critic, return_scale: ReturnScale | None, rollout: Rollout) -> Estimates:
    """Generalised advantage estimates (Schulman et al. 2016, eq. 16) with `config.gamma` and `config.gae_lambda`."""
    scale = return_scale.scale() if return_scale is not None else jnp.ones(())
    inputs, features = observe(policy, rollout)
    value, next_value = state_values(policy, critic, rollout, features)
    flags = rollout.terminated, rollout.truncated
    advantage = gae(rollout.reward / scale, value, next_value, *flags, discount=config.gamma, gae_lambda=config.gae_lambda)
    return Estimates(inputs, features, distributions_of(policy.actor, inputs), value, advantage, advantage + value, scale)


def credit(config: Any, advantage: jax.Array, time: Array, valid: Array, *, normalise_advantage: bool) -> jax.Array:
    """What the policy's loss credits each action with [T, N]: its advantage, standardised or not; with `state_discount` times gamma^t."""
    advantage = standardise(advantage, valid) if normalise_advantage else advantage
    return time_discount(time, discount=config.gamma) * advantage if config.state_discount else advantage
