"""Proximal policy optimisation with a KL penalty: ascend the surrogate, less what it costs to move away from the policy that acted.

Schulman et al. 2017, arXiv:1707.06347, section 4: the penalised objective is eq. 8; the coefficient beta is doubled after a
batch whose step went further than 1.5 times the target, and halved after one that stayed within the target divided by 1.5.
The KL divergence is that of the distributions themselves, not an estimate from samples. Advantages are GAE (Schulman et al.
2016, eq. 16). Added: beta stays within fixed limits, since what has become 0 can no longer be doubled.
Left out: recomputing advantages between epochs.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from ..audit import conclude
from ..config import check_bounds, configuration
from ..distributions import Distribution
from ..estimates import credit, estimate
from ..math.divergences import adaptive_kl_coefficient
from ..math.policy_gradient import importance_ratio, kl_penalised_surrogate_loss
from ..math.reduce import masked_mean
from ..math.values import squared_value_loss
from ..minibatches import check_minibatch, check_sequences, clipped_adam, descend, gradient_step, scheduled, sequence_length
from ..normalise import ReturnScale, start_return_scale
from ..policies import (
    Actor,
    ActorCriticSettings,
    Critic,
    Inputs,
    StochasticPolicy,
    act,
    actor_and_critic,
    distributions_and_values,
    distributions_of,
)
from ..types import EnvironmentSpec, PyTree, Rollout

__all__ = ["PPOPenalty", "State", "act", "init", "update"]

COEFFICIENT_LIMITS = 1e-4, 1e4  # of an adaptive coefficient: four powers of ten to either side of the paper's first value


@configuration
class PPOPenalty(ActorCriticSettings):
    """Proximal policy optimisation with a fixed or adaptive penalty on the KL divergence."""

    gamma: float = 0.99
    """Discount factor."""
    gae_lambda: float = 0.95
    """Trace decay of the advantage estimator: 0 is the one-step TD error, 1 the Monte Carlo return."""
    kl_penalty_coef: float = 1.0
    """Weight of the KL divergence in the loss: of the first batch where it adapts, of every batch where it does not."""
    target_kl: float | None = 0.01
    """KL divergence of a batch's step towards which the weight adapts; None keeps the weight as it is."""
    kl_direction: Literal["old||new", "new||old"] = "old||new"
    """Which of the two KL divergences is penalised, and held against the target."""
    num_steps: int = 256
    """Steps of each environment in one batch."""
    epochs: int = 10
    """Passes over each batch."""
    minibatch_size: int = 64
    """Transitions in one gradient step; must divide num_steps times the number of environments."""
    sequence_length: int = 16
    """Steps in a row that a policy with a memory learns from; must divide num_steps and minibatch_size."""
    learning_rate: float = 3e-4
    """Step size of Adam."""
    learning_rate_schedule: Literal["constant", "linear"] = "constant"
    """Keep `learning_rate`, or let it fall linearly to 0 over the run."""
    max_grad_norm: float = 0.5
    """Gradients of actor and critic together are scaled down to at most this norm."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    value_coef: float = 0.5
    """Weight of the critic's loss."""
    normalise_advantage: bool = True
    """Give the advantages of each minibatch mean 0 and standard deviation 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, gamma="[0, 1]", gae_lambda="[0, 1]", kl_penalty_coef="[0, inf)", target_kl="(0, inf)")
        check_bounds(
            self, num_steps="[1, inf)", epochs="[1, inf)", minibatch_size="[1, inf)", sequence_length="[1, inf)", learning_rate="(0, inf)"
        )
        check_bounds(self, max_grad_norm="(0, inf]", entropy_coef="[0, inf)", value_coef="[0, inf)")
        check_sequences(self)


class State(NamedTuple):
    """Everything that learning changes."""

    acting: StochasticPolicy
    critic: Critic
    optimiser: optax.OptState
    return_scale: ReturnScale | None  # None where rewards are not normalised
    kl_penalty_coef: jax.Array  # [] beta of the next batch


class Batch(NamedTuple):
    """What the loss needs of each transition, [T, N, ...]: of a batch, or of a minibatch of sequences from it."""

    inputs: Inputs
    action: jax.Array
    old: Distribution  # that acted
    advantage: jax.Array
    value_target: jax.Array
    valid: jax.Array


def init(config: PPOPenalty, spec: EnvironmentSpec, key: jax.Array) -> State:
    """Parameters, optimiser and statistics before the first step; ValueError for a minibatch that does not fit the batch."""
    check_minibatch(config, spec.num_envs)
    policy, critic = actor_and_critic(config, spec, key)
    return State(
        acting=policy,
        critic=critic,
        optimiser=clipped_adam(config).init(ravel_pytree((policy.actor, critic))[0]),
        return_scale=start_return_scale(config, spec.num_envs),
        kl_penalty_coef=jnp.asarray(config.kl_penalty_coef, float),
    )


def divergence(config: PPOPenalty, old: Distribution, new: Distribution) -> jax.Array:
    """The exact KL divergence of each row, in the direction that is penalised."""
    return old.kl_to(new) if config.kl_direction == "old||new" else new.kl_to(old)


def loss(params: tuple[Actor, Critic], batch: Batch, beta: jax.Array, config: PPOPenalty) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Minus Schulman et al. 2017, eq. 8, with the critic's loss and the entropy bonus of eq. 9; and what to report of it."""
    actor, critic = params
    new, value = distributions_and_values(actor, critic, batch.inputs)
    ratio = importance_ratio(new.log_prob(batch.action), batch.old.log_prob(batch.action))
    advantage = credit(config, batch.advantage, batch.inputs.time, batch.valid, normalise_advantage=config.normalise_advantage)
    penalised = kl_penalised_surrogate_loss(ratio, advantage, divergence(config, batch.old, new), penalty_coef=beta)
    policy_loss = masked_mean(penalised, batch.valid)
    value_loss = masked_mean(squared_value_loss(value, batch.value_target), batch.valid)
    entropy = masked_mean(new.entropy(), batch.valid)
    return policy_loss + config.value_coef * value_loss - config.entropy_coef * entropy, {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
    }


def update(config: PPOPenalty, state: State, rollout: Rollout, frozen: None, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
    """One iteration on a batch [T, N]: advantages, epochs of minibatches, the next coefficient, and the audit of the step."""
    policy, beta = state.acting, state.kl_penalty_coef
    learning_rate = scheduled(config.learning_rate, config.learning_rate_schedule, rollout.progress)
    before = estimate(config, policy, state.critic, state.return_scale, rollout)
    transitions = Batch(
        inputs=before.inputs,
        action=rollout.action,
        old=before.old,
        advantage=before.advantage,
        value_target=before.value_target,
        valid=rollout.valid,
    )
    flat, unravel = ravel_pytree((policy.actor, state.critic))

    def step(carry: PyTree, batch: Batch) -> tuple[PyTree, dict[str, jax.Array]]:
        return gradient_step(lambda flat: loss(unravel(flat), batch, beta, config), *carry, clipped_adam(config), learning_rate)

    how = {"epochs": config.epochs, "minibatch_size": config.minibatch_size, "length": sequence_length(config)}
    (flat, moments), metrics = descend(step, (flat, state.optimiser), transitions, key, **how)

    actor, critic = unravel(flat)
    moved = policy._replace(actor=actor)
    # Of the step alone: the penalty has no hold on how far the normaliser's update will move the policy.
    kl = masked_mean(divergence(config, before.old, distributions_of(actor, before.inputs)), rollout.valid)
    next_beta = beta
    if config.target_kl is not None:
        next_beta = jnp.clip(adaptive_kl_coefficient(beta, kl, target=config.target_kl), *COEFFICIENT_LIMITS)

    acting, return_scale, audit = conclude(config, moved, state.return_scale, rollout, before)
    metrics |= audit | {"penalised_kl": kl, "kl_penalty_coefficient": beta, "learning_rate": jnp.asarray(learning_rate)}
    return State(acting, critic, moments, return_scale, next_beta), metrics
