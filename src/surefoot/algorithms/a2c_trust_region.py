"""Advantage actor-critic in a trust region: each row's gradient is bent until it no longer leads away from an average of past policies.

Wang et al. 2017, arXiv:1611.01224, section 3.3, on the policy: with g the gradient of a row's objective by the statistics of its
distribution (logits, or means and log standard deviations) and k that of KL(average || policy), the statistics follow the
nearest z to g with k . z <= delta; the average of the parameters decays by alpha = 0.99. All else is A2C (Mnih et al. 2016,
arXiv:1602.01783, algorithm S3).
k . z is how fast, to first order, the step leaves the average: k is 0 at the average itself, and a step is held back only once
the policy has left it and means to go on. A memory of the average begins each batch with what the policy remembers.
Left out: the off-policy half of the paper, its replay, Retrace and truncated importance weights.
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
from ..math.policy_gradient import score_function_loss
from ..math.reduce import masked_mean, polyak
from ..math.trust_region import project_onto_half_space
from ..math.values import squared_value_loss
from ..minibatches import clipped_optimiser, gradient_step, scheduled
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
from ..types import EnvironmentSpec, Rollout

__all__ = ["A2CTrustRegion", "State", "act", "init", "update"]


@configuration
class A2CTrustRegion(ActorCriticSettings):
    """Synchronous advantage actor-critic whose gradient stays near an average of past policies."""

    gamma: float = 0.99
    """Discount factor."""
    gae_lambda: float = 1.0
    """Trace decay of the advantage estimator: 1 is the n-step return of the whole batch, 0 the one-step TD error."""
    max_kl_slope: float = 1.0
    """Bound delta on how fast each row's gradient may raise KL(average || policy), to first order; inf is plain A2C."""
    average_decay: float = 0.99
    """Share alpha of the averaged policy that is left after each batch; the rest is the new policy."""
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
        check_bounds(self, max_kl_slope="[0, inf]", average_decay="[0, 1]")
        check_bounds(self, max_grad_norm="(0, inf]", entropy_coef="[0, inf)", value_coef="[0, inf)")


class State(NamedTuple):
    """Everything that learning changes."""

    acting: StochasticPolicy
    critic: Critic
    average: Actor
    optimiser: optax.OptState
    return_scale: ReturnScale | None  # None where rewards are not normalised


class Batch(NamedTuple):
    """What the loss needs of each transition, [T, N, ...]."""

    inputs: Inputs
    along: jax.Array  # [T, N, D] where the statistics are to go
    value_target: jax.Array
    valid: jax.Array


def init(config: A2CTrustRegion, spec: EnvironmentSpec, key: jax.Array) -> State:
    """Parameters, optimiser and statistics before the first step."""
    policy, critic = actor_and_critic(config, spec, key)
    return State(
        acting=policy,
        critic=critic,
        average=policy.actor,
        optimiser=clipped_optimiser(config).init(ravel_pytree((policy.actor, critic))[0]),
        return_scale=start_return_scale(config, spec.num_envs),
    )


def statistics(distribution: Distribution) -> jax.Array:
    """The parameters of each row's distribution, or what has their shapes, as one vector [T, N, D]."""
    return jnp.concatenate([x.reshape(*x.shape[:2], -1) for x in jax.tree.leaves(distribution)], axis=-1)


def directions(
    config: A2CTrustRegion, now: Distribution, average: Distribution, action: jax.Array, advantage: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(z, g), both [T, N, D]: where the statistics of each row are to go, and where its objective alone would have them go."""

    def objective(now: Distribution) -> jax.Array:
        now = now.free()
        return jnp.sum(config.entropy_coef * now.entropy() - score_function_loss(now.log_prob(action), advantage))

    def divergence(now: Distribution) -> jax.Array:
        return jnp.sum(average.kl_to(now.free()))

    gradient, away = statistics(jax.grad(objective)(now)), statistics(jax.grad(divergence)(now))
    return project_onto_half_space(gradient, away, bound=config.max_kl_slope), gradient


def loss(params: tuple[Actor, Critic], batch: Batch, config: A2CTrustRegion) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What has the gradient z, by the statistics, in place of A2C's policy loss and entropy bonus; and the critic's loss."""
    actor, critic = params
    distribution, value = distributions_and_values(actor, critic, batch.inputs)
    value_loss = masked_mean(squared_value_loss(value, batch.value_target), batch.valid)
    return config.value_coef * value_loss - masked_mean(jnp.sum(batch.along * statistics(distribution), axis=-1), batch.valid), {
        "value_loss": value_loss
    }


def update(config: A2CTrustRegion, state: State, rollout: Rollout, frozen: None, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
    """One iteration on a batch [T, N]: advantages, the projection, one gradient step, the average, and the audit of the step."""
    policy, valid = state.acting, rollout.valid
    learning_rate = scheduled(config.learning_rate, config.learning_rate_schedule, rollout.progress)
    before = estimate(config, policy, state.critic, state.return_scale, rollout)
    advantage = credit(config, before.advantage, rollout.time, valid, normalise_advantage=config.normalise_advantage)
    average = distributions_of(state.average, before.inputs)
    along, gradient = directions(config, before.old, average, rollout.action, advantage)
    batch = Batch(before.inputs, along, before.value_target, valid)
    flat, unravel = ravel_pytree((policy.actor, state.critic))
    (flat, moments), metrics = gradient_step(
        lambda flat: loss(unravel(flat), batch, config), flat, state.optimiser, clipped_optimiser(config), learning_rate
    )
    actor, critic = unravel(flat)

    moved = policy._replace(actor=actor)
    acting, return_scale, audit = conclude(config, moved, state.return_scale, rollout, before)
    metrics |= audit | {
        "policy_loss": masked_mean(score_function_loss(before.old.log_prob(rollout.action), advantage), valid),
        "average_kl": masked_mean(average.kl_to(before.old), valid),
        "projected_fraction": masked_mean(jnp.any(along != gradient, axis=-1).astype(advantage.dtype), valid),
        "learning_rate": jnp.asarray(learning_rate),
    }
    average_actor = polyak(state.average, actor, rate=1 - config.average_decay)
    return State(acting, critic, average_actor, moments, return_scale), metrics
