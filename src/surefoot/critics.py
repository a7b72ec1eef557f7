"""Fitting a critic to its targets, for the methods whose policy step leaves the critic alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from .math.reduce import masked_mean
from .math.values import squared_value_loss
from .minibatches import descend
from .networks import over_rows
from .pathwise import ActionCritic
from .policies import Critic
from .types import Observation


def refuse_shared_trunk(config: Any) -> None:
    """Raise a ValueError for a method whose critic is fitted on its own."""
    if config.shared_trunk:
        raise ValueError(
            f"{type(config).__name__} fits its critic apart from the policy's step, and on a shared trunk that would move the policy; "
            "leave shared_trunk at False, or use ppo or a2c."
        )


def critic_optimiser(config: Any, critic: Critic) -> optax.OptState:
    """The state of `fit_critic`'s Adam before the first step."""
    return optax.adam(config.critic_learning_rate).init(ravel_pytree(critic)[0])


class ValueTargets(NamedTuple):
    """What a critic is fitted to, [T, N, ...] or a minibatch [B, ...] of it."""

    obs: Observation  # normalised
    features: jax.Array  # the actor's
    value_target: jax.Array
    valid: jax.Array
    action: jax.Array | None = None  # whose value is fitted; None where the critic gives that of the state


def of_actions(values: jax.Array, action: jax.Array) -> jax.Array:
    """Of values [..., A] of every action, those of the actions taken."""
    return jnp.take_along_axis(values, action[..., None], axis=-1)[..., 0]


def row_values(critic: Any, obs: Observation, features: Any) -> jax.Array:
    """What a critic says of each row [T, N]: V(s), or Q(s, .) of every single choice [T, N, A]."""
    values: jax.Array = over_rows(critic, obs, features)
    return values


def taken_values(critic: Any, obs: Observation, features: Any, action: jax.Array) -> jax.Array:
    """Q(s, a) [T, N] of the actions taken, by a critic with a value for each choice, or by one that is given the action.

    A number beyond the bounds counts as the bound, which is what the environment gets.
    """
    if not isinstance(critic, ActionCritic) or critic.is_discrete:
        return of_actions(row_values(critic, obs, features), action)
    return row_values(critic, obs, jnp.clip(action, -1.0, 1.0) if jnp.issubdtype(action.dtype, jnp.floating) else action)


def fit_critic(
    config: Any, critic: Critic, optimiser: optax.OptState, targets: ValueTargets, key: jax.Array
) -> tuple[Critic, optax.OptState, dict[str, jax.Array]]:
    """`config.critic_epochs` passes of Adam over the squared error, in minibatches of `config.minibatch_size`; None is the batch."""

    # All parameters in one vector: a step of Adam is then one small loop, and not one for each layer.
    flat, unravel = ravel_pytree(critic)

    def step(carry: tuple[jax.Array, optax.OptState], batch: ValueTargets) -> tuple[tuple[jax.Array, optax.OptState], dict[str, jax.Array]]:
        def loss(flat: jax.Array) -> jax.Array:
            critic = unravel(flat)
            if batch.action is None:
                value = row_values(critic, batch.obs, batch.features)
            else:
                value = taken_values(critic, batch.obs, batch.features, batch.action)
            return masked_mean(squared_value_loss(value, batch.value_target), batch.valid)

        flat, optimiser = carry
        value_loss, gradient = jax.value_and_grad(loss)(flat)
        change, optimiser = optax.adam(config.critic_learning_rate).update(gradient, optimiser)
        return (flat + change, optimiser), {"value_loss": value_loss}

    size = targets.valid.size if config.minibatch_size is None else config.minibatch_size
    (flat, optimiser), metrics = descend(step, (flat, optimiser), targets, key, epochs=config.critic_epochs, minibatch_size=size)
    return unravel(flat), optimiser, {"value_loss": metrics["value_loss"]}
