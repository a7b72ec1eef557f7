"""Vanilla policy gradient with an adaptive step size: one gradient step per batch, its length steered by how far the last one went.

The gradient is that of Williams 1992 with generalised advantage estimates (Schulman et al. 2016, eq. 16). After each batch the
step size of Adam is divided by 1.5 if the policy moved further than twice the target KL divergence, and multiplied by 1.5 if it
moved less than half of it: the "vanilla PG, adaptive" of Schulman et al. 2017, arXiv:1707.06347, section 6.2, footnote 3.
Added: the step size stays within fixed limits.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from ..audit import conclude
from ..config import check_bounds, configuration
from ..critics import ValueTargets, critic_optimiser, fit_critic, refuse_shared_trunk
from ..estimates import credit, estimate
from ..math.policy_gradient import score_function_loss
from ..math.reduce import masked_mean
from ..math.trust_region import adaptive_step_size
from ..minibatches import check_minibatch, gradient_step
from ..normalise import ReturnScale, start_return_scale
from ..policies import ActorCriticSettings, Critic, StochasticPolicy, act, actor_and_critic, distributions_of
from ..types import EnvironmentSpec, Rollout

__all__ = ["State", "VPGAdaptive", "act", "init", "update"]

LEARNING_RATE_LIMITS = 1e-6, 0.1  # where there is nothing to learn no step goes anywhere, and the step size would grow without end


@configuration
class VPGAdaptive(ActorCriticSettings):
    """Vanilla policy gradient whose step size adapts to the KL divergence of its steps."""

    gamma: float = 0.99
    """Discount factor."""
    gae_lambda: float = 0.95
    """Trace decay of the advantage estimator: 0 is the one-step TD error, 1 the Monte Carlo return."""
    target_kl: float = 2e-3
    """KL divergence of one step towards which the step size adapts."""
    learning_rate: float = 1e-3
    """Step size of the actor's Adam on the first batch."""
    normalise_advantage: bool = True
    """Give the advantages of each batch mean 0 and standard deviation 1."""
    num_steps: int = 256
    """Steps of each environment in one batch."""
    critic_epochs: int = 10
    """Passes of the critic over each batch."""
    minibatch_size: int = 64
    """Transitions in one gradient step of the critic; must divide num_steps times the number of environments."""
    critic_learning_rate: float = 1e-3
    """Step size of the critic's Adam."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, gamma="[0, 1]", gae_lambda="[0, 1]", target_kl="(0, inf)", learning_rate="(0, inf)", num_steps="[1, inf)")
        check_bounds(self, critic_epochs="[1, inf)", minibatch_size="[1, inf)", critic_learning_rate="(0, inf)")
        refuse_shared_trunk(self)


class State(NamedTuple):
    """Everything that learning changes."""

    acting: StochasticPolicy
    critic: Critic
    optimiser: optax.OptState
    critic_optimiser: optax.OptState
    return_scale: ReturnScale | None  # None where rewards are not normalised
    learning_rate: jax.Array  # [] of the next batch


def init(config: VPGAdaptive, spec: EnvironmentSpec, key: jax.Array) -> State:
    """Parameters, optimisers and statistics before the first step; ValueError for a minibatch that does not fit the batch."""
    check_minibatch(config, spec.num_envs)
    policy, critic = actor_and_critic(config, spec, key)
    return State(
        acting=policy,
        critic=critic,
        optimiser=optax.scale_by_adam().init(ravel_pytree(policy.actor)[0]),
        critic_optimiser=critic_optimiser(config, critic),
        return_scale=start_return_scale(config, spec.num_envs),
        learning_rate=jnp.asarray(config.learning_rate, float),
    )


def update(config: VPGAdaptive, state: State, rollout: Rollout, frozen: None, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
    """One iteration on a batch [T, N]: advantages, one step of the policy, the next step size, the critic, and the audit."""
    policy = state.acting
    before = estimate(config, policy, state.critic, state.return_scale, rollout)
    advantage = credit(config, before.advantage, rollout.time, rollout.valid, normalise_advantage=config.normalise_advantage)
    flat, unravel = ravel_pytree(policy.actor)

    def loss(flat: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        log_prob = distributions_of(unravel(flat), before.inputs).log_prob(rollout.action)
        policy_loss = masked_mean(score_function_loss(log_prob, advantage), rollout.valid)
        return policy_loss, {"policy_loss": policy_loss}

    (flat, moments), metrics = gradient_step(loss, flat, state.optimiser, optax.scale_by_adam(), state.learning_rate)
    moved = policy._replace(actor=unravel(flat))

    # Of the step alone: the step size has no hold on how far the normaliser's update will move the policy.
    kl = masked_mean(before.old.kl_to(distributions_of(moved.actor, before.inputs)), rollout.valid)
    learning_rate = jnp.clip(adaptive_step_size(state.learning_rate, kl, target=config.target_kl), *LEARNING_RATE_LIMITS)

    targets = ValueTargets(before.inputs.obs, before.features, before.value_target, rollout.valid)
    critic, critic_moments, critic_metrics = fit_critic(config, state.critic, state.critic_optimiser, targets, key)

    acting, return_scale, audit = conclude(config, moved, state.return_scale, rollout, before)
    metrics |= critic_metrics | audit | {"step_kl": kl, "learning_rate": state.learning_rate}
    return State(acting, critic, moments, critic_moments, return_scale, learning_rate), metrics
