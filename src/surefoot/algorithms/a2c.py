"""Advantage actor-critic, synchronous: one gradient step of actor and critic together on every few steps of all environments.

Mnih et al. 2016, arXiv:1602.01783, algorithm S3, with its gradients taken from all environments at once instead of one after
the other. Each action is credited with all the rewards that the batch shows after it and the value of what comes then: n-step
returns as long as the batch, which are generalised advantage estimates with gae_lambda = 1 (Schulman et al. 2016, eq. 18); less
than 1 weighs shorter ones in. RMSprop is their eq. 1, the epsilon inside the root, and its mean square begins at 1, as in the
field's reference implementation (OpenAI Baselines, on TensorFlow): the first steps are small.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from ..audit import conclude
from ..config import check_bounds, configuration
from ..estimates import credit, estimate
from ..math.policy_gradient import score_function_loss
from ..math.reduce import masked_mean
from ..math.values import squared_value_loss
from ..minibatches import clipped_optimiser, gradient_step, scheduled
from ..normalise import ReturnScale, start_return_scale
from ..policies import Actor, ActorCriticSettings, Critic, Inputs, StochasticPolicy, act, actor_and_critic, distributions_and_values
from ..types import EnvironmentSpec, Rollout

__all__ = ["A2C", "State", "act", "init", "update"]


@configuration
class A2C(ActorCriticSettings):
    """Synchronous advantage actor-critic on short batches."""

    gamma: float = 0.99
    """Discount factor."""
    gae_lambda: float = 1.0
    """Trace decay of the advantage estimator: 1 is the n-step return of the whole batch, 0 the one-step TD error."""
    num_steps: int = 5
    """Steps of each environment in one batch, and so in one gradient step."""
    optimiser: Literal["rmsprop", "adam"] = "rmsprop"
    """What scales the gradient: RMSprop (decay 0.99), or Adam."""
    learning_rate: float = 7e-4
    """Step size of the optimiser."""
    learning_rate_schedule: Literal["constant", "linear"] = "linear"
    """Keep `learning_rate`, or let it fall linearly to 0 over the run."""
    max_grad_norm: float = 0.5
    """Gradients of actor and critic together are scaled down to at most this norm."""
    entropy_coef: float = 0.01
    """Weight of the entropy bonus."""
    value_coef: float = 0.5
    """Weight of the critic's loss."""
    normalise_advantage: bool = False
    """Give the advantages of each batch mean 0 and standard deviation 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, gamma="[0, 1]", gae_lambda="[0, 1]", num_steps="[1, inf)", learning_rate="(0, inf)")
        check_bounds(self, max_grad_norm="(0, inf]", entropy_coef="[0, inf)", value_coef="[0, inf)")


class State(NamedTuple):
    """Everything that learning changes."""

    acting: StochasticPolicy
    critic: Critic
    optimiser: optax.OptState
    return_scale: ReturnScale | None  # None where rewards are not normalised


class Batch(NamedTuple):
    """What the loss needs of each transition, [T, N, ...]."""

    inputs: Inputs
    action: jax.Array
    advantage: jax.Array
    value_target: jax.Array
    valid: jax.Array


def init(config: A2C, spec: EnvironmentSpec, key: jax.Array) -> State:
    """Parameters, optimiser and statistics before the first step."""
    policy, critic = actor_and_critic(config, spec, key)
    return State(
        acting=policy,
        critic=critic,
        optimiser=clipped_optimiser(config).init(ravel_pytree((policy.actor, critic))[0]),
        return_scale=start_return_scale(config, spec.num_envs),
    )


def loss(params: tuple[Actor, Critic], batch: Batch, config: A2C) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The objectives of Mnih et al. 2016, algorithm S3, the entropy bonus of section 4 among them, to be minimised together."""
    actor, critic = params
    distribution, value = distributions_and_values(actor, critic, batch.inputs)
    advantage = credit(config, batch.advantage, batch.inputs.time, batch.valid, normalise_advantage=config.normalise_advantage)
    policy_loss = masked_mean(score_function_loss(distribution.log_prob(batch.action), advantage), batch.valid)
    value_loss = masked_mean(squared_value_loss(value, batch.value_target), batch.valid)
    entropy = masked_mean(distribution.entropy(), batch.valid)
    return policy_loss + config.value_coef * value_loss - config.entropy_coef * entropy, {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
    }


def update(config: A2C, state: State, rollout: Rollout, frozen: None, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
    """One iteration on a batch [T, N]: advantages, one gradient step, and the audit of the step."""
    policy = state.acting
    learning_rate = scheduled(config.learning_rate, config.learning_rate_schedule, rollout.progress)
    before = estimate(config, policy, state.critic, state.return_scale, rollout)
    batch = Batch(before.inputs, rollout.action, before.advantage, before.value_target, rollout.valid)
    flat, unravel = ravel_pytree((policy.actor, state.critic))
    (flat, moments), metrics = gradient_step(
        lambda flat: loss(unravel(flat), batch, config), flat, state.optimiser, clipped_optimiser(config), learning_rate
    )
    actor, critic = unravel(flat)

    moved = policy._replace(actor=actor)
    acting, return_scale, audit = conclude(config, moved, state.return_scale, rollout, before)
    metrics |= audit | {"learning_rate": jnp.asarray(learning_rate)}
    return State(acting, critic, moments, return_scale), metrics
