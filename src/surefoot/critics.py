"""Fitting a critic to its targets, for the methods whose policy step leaves the critic alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import optax

from .math.reduce import masked_mean
from .math.values import squared_value_loss
from .minibatches import descend
from .policies import Critic
from .types import Observation


class ValueTargets(NamedTuple):
    """What a critic is fitted to, [T, N, ...] or a minibatch [B, ...] of it."""

    obs: Observation  # normalised
    value_target: jax.Array
    valid: jax.Array


def fit_critic(
    config: Any, critic: Critic, optimiser: optax.OptState, targets: ValueTargets, key: jax.Array
) -> tuple[Critic, optax.OptState, dict[str, jax.Array]]:
    """`config.critic_epochs` passes of Adam over the squared error, in minibatches of `config.minibatch_size`."""

    def gradient_step(
        carry: tuple[Critic, optax.OptState], batch: ValueTargets
    ) -> tuple[tuple[Critic, optax.OptState], dict[str, jax.Array]]:
        def loss(critic: Critic) -> jax.Array:
            return masked_mean(squared_value_loss(jax.vmap(critic)(batch.obs), batch.value_target), batch.valid)

        critic, optimiser = carry
        value_loss, gradient = jax.value_and_grad(loss)(critic)
        change, optimiser = optax.adam(config.critic_learning_rate).update(gradient, optimiser)
        return (optax.apply_updates(critic, change), optimiser), {"value_loss": value_loss}

    start = critic, optimiser
    (critic, optimiser), metrics = descend(
        gradient_step, start, targets, key, epochs=config.critic_epochs, minibatch_size=config.minibatch_size
    )
    return critic, optimiser, {"value_loss": metrics["value_loss"]}
