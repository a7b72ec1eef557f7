"""Trust region policy optimisation in Lagrangian form: the bound on the KL divergence has a price, and the price is learned.

The constrained problem is eq. 14 of Schulman et al. 2015, arXiv:1502.05477: maximise the surrogate subject to KL <= epsilon. Its
Lagrangian, surrogate - lambda (KL - epsilon), is climbed by a number of gradient steps on the whole batch (section 4 has the
penalty with a fixed coefficient); then the multiplier follows its own gradient, lambda <- max(0, lambda + alpha (KL - epsilon))
(Boyd & Vandenberghe 2004, "Convex Optimization", section 5.2, for the dual problem; Uzawa's method). Advantages are GAE
(Schulman et al. 2016, eq. 16). Adam begins anew with each batch, whose problem is a new one; the multiplier is what stays.
Left out: a guarantee for the single step, which the line search of `trpo` gives. A trunk shared by actor and critic is refused.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from ..audit import conclude
from ..config import check_bounds, configuration
from ..critics import ValueTargets, critic_optimiser, fit_critic, refuse_shared_trunk
from ..distributions import Distribution
from ..estimates import credit, estimate
from ..math.policy_gradient import importance_ratio, kl_penalised_surrogate_loss
from ..math.reduce import masked_mean
from ..math.trust_region import dual_ascent
from ..minibatches import check_minibatch, gradient_step
from ..normalise import ReturnScale, start_return_scale
from ..policies import ActorCriticSettings, Critic, Inputs, StochasticPolicy, act, actor_and_critic, distributions_of
from ..types import EnvironmentSpec, PyTree, Rollout

__all__ = ["State", "TRPOPenalty", "act", "init", "update"]


@configuration
class TRPOPenalty(ActorCriticSettings):
    """Trust region policy optimisation with a learned multiplier on the KL divergence."""

    gamma: float = 0.99
    """Discount factor."""
    gae_lambda: float = 0.95
    """Trace decay of the advantage estimator: 0 is the one-step TD error, 1 the Monte Carlo return."""
    max_kl: float = 0.01
    """The epsilon of the constraint: the mean KL divergence of one batch's step above which it becomes dearer, and below which cheaper."""
    kl_direction: Literal["old||new", "new||old"] = "old||new"
    """Which of the two KL divergences is bounded."""
    multiplier: float = 2.0
    """The lambda of the first batch: what a unit of KL divergence costs in standard deviations of the advantage."""
    multiplier_step_size: float = 10.0
    """The alpha by which lambda rises for each unit of KL divergence above max_kl, and falls for each below it."""
    inner_steps: int = 30
    """Gradient steps on each batch."""
    learning_rate: float = 1e-2
    """Step size of their Adam."""
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
        check_bounds(self, gamma="[0, 1]", gae_lambda="[0, 1]", max_kl="(0, inf)", multiplier="[0, inf)", multiplier_step_size="[0, inf)")
        check_bounds(self, inner_steps="[1, inf)", learning_rate="(0, inf)", num_steps="[1, inf)")
        check_bounds(self, critic_epochs="[1, inf)", minibatch_size="[1, inf)", critic_learning_rate="(0, inf)")
        refuse_shared_trunk(self)


class State(NamedTuple):
    """Everything that learning changes."""

    acting: StochasticPolicy
    critic: Critic
    critic_optimiser: optax.OptState
    return_scale: ReturnScale | None  # None where rewards are not normalised
    multiplier: jax.Array  # [] lambda of the next batch


def init(config: TRPOPenalty, spec: EnvironmentSpec, key: jax.Array) -> State:
    """Parameters, optimiser and statistics before the first step; ValueError for a minibatch that does not fit the batch."""
    check_minibatch(config, spec.num_envs)
    policy, critic = actor_and_critic(config, spec, key)
    return State(
        acting=policy,
        critic=critic,
        critic_optimiser=critic_optimiser(config, critic),
        return_scale=start_return_scale(config, spec.num_envs),
        multiplier=jnp.asarray(config.multiplier, float),
    )


def policy_step(
    config: TRPOPenalty,
    policy: StochasticPolicy,
    multiplier: jax.Array,
    rollout: Rollout,
    inputs: Inputs,
    old: Distribution,
    advantage: jax.Array,
) -> tuple[StochasticPolicy, jax.Array, dict[str, jax.Array]]:
    """The policy after the steps up the Lagrangian, and the multiplier after its own step."""
    flat, unravel = ravel_pytree(policy.actor)
    old_log_prob = old.log_prob(rollout.action)

    def divergence(new: Distribution) -> jax.Array:
        return old.kl_to(new) if config.kl_direction == "old||new" else new.kl_to(old)

    def loss(flat: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        new = distributions_of(unravel(flat), inputs)
        ratio, kl = importance_ratio(new.log_prob(rollout.action), old_log_prob), divergence(new)
        penalised = kl_penalised_surrogate_loss(ratio, advantage, kl, penalty_coef=multiplier)
        return masked_mean(penalised, rollout.valid), {"policy_loss": masked_mean(-ratio * advantage, rollout.valid)}

    def step(carry: PyTree, _: None) -> tuple[PyTree, dict[str, jax.Array]]:
        return gradient_step(loss, *carry, optax.scale_by_adam(), config.learning_rate)

    start = flat, optax.scale_by_adam().init(flat)
    (flat, _), metrics = jax.lax.scan(step, start, None, length=config.inner_steps)
    # Of the step alone: the multiplier has no hold on how far the normaliser's update will move the policy.
    kl = masked_mean(divergence(distributions_of(unravel(flat), inputs)), rollout.valid)
    after = dual_ascent(multiplier, kl, max_divergence=config.max_kl, step_size=config.multiplier_step_size)
    metrics = jax.tree.map(lambda x: x[-1], metrics) | {"constrained_kl": kl, "kl_multiplier": multiplier}
    return policy._replace(actor=unravel(flat)), after, metrics


def update(config: TRPOPenalty, state: State, rollout: Rollout, frozen: None, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
    """One iteration on a batch [T, N]: advantages, the policy's steps and the multiplier's, the critic, and the audit."""
    policy = state.acting
    before = estimate(config, policy, state.critic, state.return_scale, rollout)
    advantage = credit(config, before.advantage, rollout.time, rollout.valid, normalise_advantage=True)
    stepped, multiplier, metrics = policy_step(config, policy, state.multiplier, rollout, before.inputs, before.old, advantage)

    targets = ValueTargets(before.inputs.obs, before.features, before.value_target, rollout.valid)
    critic, critic_optimiser, critic_metrics = fit_critic(config, state.critic, state.critic_optimiser, targets, key)

    acting, return_scale, audit = conclude(config, stepped, state.return_scale, rollout, before)
    return State(acting, critic, critic_optimiser, return_scale, multiplier), metrics | critic_metrics | audit
