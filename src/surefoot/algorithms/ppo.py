"""Proximal policy optimisation: ascend the clipped surrogate for a few epochs over each batch.

Schulman et al. 2017, arXiv:1707.06347: the clipped objective is eq. 7, the sum of losses eq. 9, the loop Algorithm 1.
Advantages are GAE (Schulman et al. 2016, eq. 16). Dual clip is eq. 5 of Ye et al. 2020, arXiv:1912.09729.
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
from ..estimates import credit, estimate
from ..math.divergences import kl_k3
from ..math.policy_gradient import clipped_surrogate_loss, importance_ratio
from ..math.reduce import masked_mean
from ..math.values import clipped_value_loss
from ..minibatches import check_minibatch, check_sequences, clipped_adam, descend, gradient_step, scheduled, sequence_length
from ..normalise import ReturnScale, start_return_scale
from ..policies import Actor, ActorCriticSettings, Critic, Inputs, StochasticPolicy, act, actor_and_critic, distributions_and_values
from ..types import EnvironmentSpec, PyTree, Rollout

__all__ = ["PPO", "State", "act", "init", "update"]


@configuration
class PPO(ActorCriticSettings):
    """Proximal policy optimisation with the clipped surrogate."""

    gamma: float = 0.99
    """Discount factor."""
    gae_lambda: float = 0.95
    """Trace decay of the advantage estimator: 0 is the one-step TD error, 1 the Monte Carlo return."""
    clip: float = 0.2
    """How far the probability ratio may leave 1 before the objective turns flat."""
    clip_schedule: Literal["constant", "linear"] = "constant"
    """Keep `clip`, or let it fall linearly to 0 over the run."""
    dual_clip: float | None = None
    """Bound on the ratio's weight where the advantage is negative, above 1; none by default."""
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
    clip_value: float | None = None
    """How far the critic may move from its old values in one batch, in units of its targets; unlimited by default."""
    target_kl: float | None = None
    """Stop the epochs once an epoch's mean KL exceeds 1.5 times this; never by default."""
    normalise_advantage: bool = True
    """Give the advantages of each minibatch mean 0 and standard deviation 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, gamma="[0, 1]", gae_lambda="[0, 1]", clip="(0, inf)", dual_clip="(1, inf)", learning_rate="(0, inf)")
        check_bounds(
            self, num_steps="[1, inf)", epochs="[1, inf)", minibatch_size="[1, inf)", sequence_length="[1, inf)", max_grad_norm="(0, inf]"
        )
        check_bounds(self, entropy_coef="[0, inf)", value_coef="[0, inf)", clip_value="(0, inf)", target_kl="(0, inf)")
        check_sequences(self)


class State(NamedTuple):
    """Everything that learning changes."""

    acting: StochasticPolicy
    critic: Critic
    optimiser: optax.OptState
    return_scale: ReturnScale | None  # None where rewards are not normalised


class Batch(NamedTuple):
    """What the loss needs of each transition, [T, N, ...]: of a batch, or of a minibatch of sequences from it."""

    inputs: Inputs
    action: jax.Array
    old_log_prob: jax.Array
    old_value: jax.Array
    advantage: jax.Array
    value_target: jax.Array
    valid: jax.Array


def init(config: PPO, spec: EnvironmentSpec, key: jax.Array) -> State:
    """Parameters, optimiser and statistics before the first step; ValueError for a minibatch that does not fit the batch."""
    check_minibatch(config, spec.num_envs)
    policy, critic = actor_and_critic(config, spec, key)
    return State(
        acting=policy,
        critic=critic,
        optimiser=clipped_adam(config).init(ravel_pytree((policy.actor, critic))[0]),
        return_scale=start_return_scale(config, spec.num_envs),
    )


def loss(params: tuple[Actor, Critic], batch: Batch, clip: jax.Array | float, config: PPO) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Schulman et al. 2017, eq. 9, to be minimised; and what to report of it."""
    actor, critic = params
    distribution, value = distributions_and_values(actor, critic, batch.inputs)
    log_prob = distribution.log_prob(batch.action)
    ratio = importance_ratio(log_prob, batch.old_log_prob)
    advantage = credit(config, batch.advantage, batch.inputs.time, batch.valid, normalise_advantage=config.normalise_advantage)
    policy_loss = masked_mean(clipped_surrogate_loss(ratio, advantage, clip=clip, dual_clip=config.dual_clip), batch.valid)
    clip_value = jnp.inf if config.clip_value is None else config.clip_value
    value_loss = masked_mean(clipped_value_loss(value, batch.old_value, batch.value_target, clip=clip_value), batch.valid)
    entropy = masked_mean(distribution.entropy(), batch.valid)
    return policy_loss + config.value_coef * value_loss - config.entropy_coef * entropy, {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "clip_fraction": masked_mean((jnp.abs(ratio - 1.0) > clip).astype(ratio.dtype), batch.valid),
        "approximate_kl": masked_mean(kl_k3(batch.old_log_prob, log_prob), batch.valid),
    }


def update(config: PPO, state: State, rollout: Rollout, frozen: None, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
    """One iteration of Algorithm 1 on a batch [T, N]: advantages, epochs of minibatches, and the audit of the step."""
    policy = state.acting
    learning_rate = scheduled(config.learning_rate, config.learning_rate_schedule, rollout.progress)
    clip = scheduled(config.clip, config.clip_schedule, rollout.progress)
    before = estimate(config, policy, state.critic, state.return_scale, rollout)
    transitions = Batch(
        inputs=before.inputs,
        action=rollout.action,
        old_log_prob=before.old.log_prob(rollout.action),
        old_value=before.value,
        advantage=before.advantage,
        value_target=before.value_target,
        valid=rollout.valid,
    )
    flat, unravel = ravel_pytree((policy.actor, state.critic))

    def step(carry: PyTree, batch: Batch) -> tuple[PyTree, dict[str, jax.Array]]:
        return gradient_step(lambda flat: loss(unravel(flat), batch, clip, config), *carry, clipped_adam(config), learning_rate)

    def go_on(metrics: dict[str, jax.Array]) -> jax.Array | bool:
        return config.target_kl is None or metrics["approximate_kl"] <= 1.5 * config.target_kl

    how = {"epochs": config.epochs, "minibatch_size": config.minibatch_size, "length": sequence_length(config)}
    (flat, moments), metrics = descend(step, (flat, state.optimiser), transitions, key, go_on=go_on, **how)

    actor, critic = unravel(flat)
    moved = policy._replace(actor=actor)
    acting, return_scale, audit = conclude(config, moved, state.return_scale, rollout, before)
    metrics |= audit | {"clip": jnp.asarray(clip), "learning_rate": jnp.asarray(learning_rate)}
    return State(acting, critic, moments, return_scale), metrics
