"""Actors, critics, and the stochastic policy that the policy-gradient methods share."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp

from .config import configuration
from .distributions import Categorical, DiagonalGaussian, Distribution
from .networks import build_torso, network_name, orthogonal_linear
from .normalise import Normaliser, normalise
from .spaces import action_size
from .types import EnvironmentSpec, Observation, PyTree, Rollout


@configuration
class ActorCriticSettings:
    """The settings that every method with an actor and a critic has."""

    normalise_observation: bool = True
    """Subtract the running mean of observations and divide by their running standard deviation."""
    normalise_reward: bool = True
    """Divide rewards by the running standard deviation of the discounted return."""
    network: str = "mlp"
    """The torso of actor and critic: 'mlp', or a class (Python), or 'module:Class'."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers of 'mlp'."""
    activation: Literal["tanh", "relu", "elu", "gelu", "silu"] = "tanh"
    """Activation of the hidden layers of 'mlp'."""
    initial_log_std: float = 0.0
    """Logarithm of the standard deviation with which continuous actions, scaled to [-1, 1], are drawn at first."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "network", network_name(self.network))


class Actor(eqx.Module):
    """One observation to a distribution over actions in the policy's units."""

    torso: Any
    head: eqx.nn.Linear
    log_std: jax.Array | None  # [A] for continuous actions, independent of the state

    def __init__(
        self,
        network: str,
        observation_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        key: jax.Array,
        *,
        initial_log_std: float = 0.0,
        **shape: Any,
    ):
        torso_key, head_key = jax.random.split(key)
        self.torso, features = build_torso(network, observation_space, torso_key, **shape)
        # A small last layer starts the policy near uniform, or near zero mean (Andrychowicz et al. 2021, section 3.2).
        self.head = orthogonal_linear(features, action_size(action_space), 0.01, head_key)
        is_continuous = isinstance(action_space, gymnasium.spaces.Box)
        self.log_std = jnp.full(action_size(action_space), float(initial_log_std)) if is_continuous else None

    def __call__(self, obs: Observation, action_mask: jax.Array | None = None) -> Distribution:
        output = self.head(self.torso(obs))
        if self.log_std is None:
            return Categorical.from_logits(output, action_mask)
        return DiagonalGaussian(output, jnp.broadcast_to(self.log_std, output.shape))


class Critic(eqx.Module):
    """One observation to one value."""

    torso: Any
    head: eqx.nn.Linear

    def __init__(self, network: str, observation_space: gymnasium.Space[Any], key: jax.Array, **shape: Any):
        torso_key, head_key = jax.random.split(key)
        self.torso, features = build_torso(network, observation_space, torso_key, **shape)
        self.head = orthogonal_linear(features, 1, 1.0, head_key)

    def __call__(self, obs: Observation) -> jax.Array:
        return self.head(self.torso(obs))[0]


def actor_and_critic(config: ActorCriticSettings, spec: EnvironmentSpec, key: jax.Array) -> tuple[Actor, Critic]:
    """Separate networks of the shape that `config` has, with nothing in common."""
    actor_key, critic_key = jax.random.split(key)
    shape = {"hidden": config.hidden, "activation": config.activation}
    return (
        Actor(config.network, spec.observation_space, spec.action_space, actor_key, initial_log_std=config.initial_log_std, **shape),
        Critic(config.network, spec.observation_space, critic_key, **shape),
    )


class StochasticPolicy(NamedTuple):
    """All that acting needs: the actor, and the normaliser of what it sees."""

    actor: Actor
    normaliser: Normaliser

    def distribution(self, obs: Observation, action_mask: jax.Array | None = None) -> Distribution:
        """For raw observations [N, ...]."""
        return jax.vmap(self.actor)(normalise(self.normaliser, obs), action_mask)


def act(
    config: Any, acting: StochasticPolicy, obs: Observation, action_mask: jax.Array | None, carry: PyTree, key: jax.Array | None
) -> tuple[jax.Array, PyTree]:
    """One action for each of N streams, drawn with `key`, or the distribution's mode without one."""
    distribution = acting.distribution(obs, action_mask)
    return (distribution.mode() if key is None else distribution.sample(key)), carry


def state_values(critic: Critic, normaliser: Normaliser, rollout: Rollout) -> tuple[jax.Array, jax.Array]:
    """V(s) of every row and V of its true successor, both [T, N], by one pass of the critic over each observation."""

    def value(obs: Observation) -> jax.Array:
        return jax.vmap(critic)(normalise(normaliser, obs))

    values, final_values = jax.vmap(value)(rollout.obs), jax.vmap(value)(rollout.final_obs)
    following = jnp.concatenate([values[1:], value(rollout.last_obs)[None]])
    return values, jnp.where(rollout.terminated | rollout.truncated, final_values, following)
