"""Vanilla policy gradient with an adaptive step size: one gradient step per batch, its length steered by how far the last one went.

The gradient is that of Williams 1992 with generalised advantage estimates (Schulman et al. 2016, eq. 16). After each batch the
step size of Adam is divided by 1.5 if the policy moved further than twice the target KL divergence, and multiplied by 1.5 if it
moved less than half of it: the "vanilla PG, adaptive" of Schulman et al. 2017, arXiv:1707.06347, section 6.2, footnote 3.
Added: the step size stays within fixed limits.
Left out: a trunk shared by actor and critic, and the weight gamma^t of the true discounted gradient, as is customary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from ..audit import conclude
from ..config import check_bounds, configuration
from ..critics import ValueTargets, critic_optimiser, fit_critic
from ..math.policy_gradient import score_function_loss
from ..math.reduce import explained_variance, masked_mean, standardise
from ..math.returns import gae
from ..math.trust_region import adaptive_step_size
from ..minibatches import check_minibatch
from ..normalise import ReturnScale, normalise, observation_normaliser
from ..policies import ActorCriticSettings, Critic, StochasticPolicy, act, actor_and_critic, state_values
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
    actor, critic = actor_and_critic(config, spec, key)
    return State(
        acting=StochasticPolicy(actor, observation_normaliser(spec.observation_space) if config.normalise_observation else None),
        critic=critic,
        optimiser=optax.scale_by_adam().init(ravel_pytree(actor)[0]),
        critic_optimiser=critic_optimiser(config, critic),
        return_scale=ReturnScale.start(spec.num_envs) if config.normalise_reward else None,
        learning_rate=jnp.asarray(config.learning_rate, float),
    )


def update(config: VPGAdaptive, state: State, rollout: Rollout, frozen: None, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
    """One iteration on a batch [T, N]: advantages, one step of the policy, the next step size, the critic, and the audit."""
    policy = state.acting
    scale = state.return_scale.scale() if state.return_scale is not None else jnp.ones(())
    value, next_value = state_values(state.critic, policy.normaliser, rollout)
    flags = rollout.terminated, rollout.truncated
    advantage = gae(rollout.reward / scale, value, next_value, *flags, discount=config.gamma, gae_lambda=config.gae_lambda)
    weight = standardise(advantage, rollout.valid) if config.normalise_advantage else advantage
    old = jax.vmap(policy.distribution)(rollout.obs, rollout.action_mask)

    # All parameters in one vector: a step of Adam is then one small loop, and not one for each layer.
    flat, unravel = ravel_pytree(policy.actor)

    def loss(flat: jax.Array) -> jax.Array:
        distribution = jax.vmap(policy._replace(actor=unravel(flat)).distribution)(rollout.obs, rollout.action_mask)
        return masked_mean(score_function_loss(distribution.log_prob(rollout.action), weight), rollout.valid)

    policy_loss, gradient = jax.value_and_grad(loss)(flat)
    direction, moments = optax.scale_by_adam().update(gradient, state.optimiser)
    moved = policy._replace(actor=unravel(flat - state.learning_rate * direction))

    # Of the step alone: the step size has no hold on how far the normaliser's update will move the policy.
    kl = masked_mean(old.kl_to(jax.vmap(moved.distribution)(rollout.obs, rollout.action_mask)), rollout.valid)
    learning_rate = jnp.clip(adaptive_step_size(state.learning_rate, kl, target=config.target_kl), *LEARNING_RATE_LIMITS)

    targets = ValueTargets(normalise(policy.normaliser, rollout.obs), advantage + value, rollout.valid)
    critic, critic_moments, metrics = fit_critic(config, state.critic, state.critic_optimiser, targets, key)

    acting, return_scale, audit = conclude(config, moved, state.return_scale, rollout, old, advantage * scale)
    metrics |= audit
    metrics |= {
        "policy_loss": policy_loss,
        "gradient_norm": jnp.linalg.norm(gradient),
        "explained_variance": explained_variance(value, targets.value_target, rollout.valid),
        "step_kl": kl,
        "learning_rate": state.learning_rate,
    }
    return State(acting, critic, moments, critic_moments, return_scale, learning_rate), metrics
