"""Trust region policy optimisation: the natural gradient, as far as the divergence between the policies allows.

Schulman et al. 2015, arXiv:1502.05477: the constrained problem is eq. 14, the conjugate gradient step and the line search
are appendix C. Advantages are GAE (Schulman et al. 2016, eq. 16). The step's length uses the undamped curvature.
Left out: the vine method of sampling. A trunk shared by actor and critic is refused: the critic's gradient would move the
policy out of its region.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from ..audit import conclude
from ..config import check_bounds, configuration
from ..critics import ValueTargets, critic_optimiser, fit_critic, refuse_shared_trunk
from ..distributions import Distribution
from ..estimates import credit, estimate
from ..math.policy_gradient import importance_ratio, surrogate_loss
from ..math.reduce import masked_mean
from ..math.trust_region import backtracking_line_search, conjugate_gradient, curvature_product, trust_region_scale
from ..minibatches import check_minibatch
from ..normalise import ReturnScale, start_return_scale
from ..policies import ActorCriticSettings, Critic, Inputs, StochasticPolicy, act, actor_and_critic, distributions_of
from ..types import EnvironmentSpec, Rollout

__all__ = ["TRPO", "State", "act", "init", "update"]


@configuration
class TRPO(ActorCriticSettings):
    """Trust region policy optimisation: the natural gradient within a bound on the KL divergence."""

    gamma: float = 0.99
    """Discount factor."""
    gae_lambda: float = 0.95
    """Trace decay of the advantage estimator: 0 is the one-step TD error, 1 the Monte Carlo return."""
    max_kl: float = 0.01
    """Bound on the mean KL divergence of one step."""
    kl_direction: Literal["old||new", "new||old"] = "old||new"
    """Which of the two KL divergences the line search holds within the bound; their curvature is the same."""
    cg_iterations: int = 10
    """Most iterations of the conjugate gradient method."""
    cg_damping: float = 0.1
    """Multiple of the identity added to the Fisher matrix while solving for the direction."""
    fisher_fraction: float = 1.0
    """Share of the batch, evenly spaced in time, on which the Fisher matrix is estimated."""
    backtrack_factor: float = 0.8
    """By how much each try of the line search is shorter than the one before."""
    backtrack_tries: int = 15
    """Tries of the line search before the old parameters are kept."""
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
        check_bounds(self, gamma="[0, 1]", gae_lambda="[0, 1]", max_kl="(0, inf)", cg_iterations="[1, inf)", cg_damping="[0, inf)")
        check_bounds(self, fisher_fraction="(0, 1]", backtrack_factor="(0, 1)", backtrack_tries="[1, inf)", num_steps="[1, inf)")
        check_bounds(self, critic_epochs="[1, inf)", minibatch_size="[1, inf)", critic_learning_rate="(0, inf)")
        refuse_shared_trunk(self)
        if self.memory != "none" and self.fisher_fraction < 1:
            raise ValueError("fisher_fraction leaves out steps, and a memory needs them all: leave it at 1, or memory at 'none'.")


class State(NamedTuple):
    """Everything that learning changes."""

    acting: StochasticPolicy
    critic: Critic
    critic_optimiser: optax.OptState
    return_scale: ReturnScale | None  # None where rewards are not normalised


def init(config: TRPO, spec: EnvironmentSpec, key: jax.Array) -> State:
    """Parameters, optimiser and statistics before the first step; ValueError for a minibatch that does not fit the batch."""
    check_minibatch(config, spec.num_envs)
    policy, critic = actor_and_critic(config, spec, key)
    return State(
        acting=policy,
        critic=critic,
        critic_optimiser=critic_optimiser(config, critic),
        return_scale=start_return_scale(config, spec.num_envs),
    )


def policy_step(
    config: TRPO, policy: StochasticPolicy, rollout: Rollout, inputs: Inputs, old: Distribution, advantage: jax.Array
) -> tuple[StochasticPolicy, dict[str, jax.Array]]:
    """The policy after one step of Schulman et al. 2015, appendix C, or exactly as it was where no try is acceptable."""
    flat, unravel = ravel_pytree(policy.actor)
    old_log_prob = old.log_prob(rollout.action)

    def distribution(parameters: jax.Array, inputs: Inputs) -> Distribution:
        return distributions_of(unravel(parameters), inputs)

    def surrogate(parameters: jax.Array) -> jax.Array:
        ratio = importance_ratio(distribution(parameters, inputs).log_prob(rollout.action), old_log_prob)
        return masked_mean(surrogate_loss(ratio, advantage), rollout.valid)

    def mean_kl(parameters: jax.Array) -> jax.Array:
        new = distribution(parameters, inputs)
        return masked_mean(old.kl_to(new) if config.kl_direction == "old||new" else new.kl_to(old), rollout.valid)

    num_steps = len(rollout.time)
    steps = np.linspace(0, num_steps, max(1, round(config.fisher_fraction * num_steps)), endpoint=False, dtype=int)
    was, seen, valid = jax.tree.map(lambda x: x[steps], (old, inputs, rollout.valid))
    weight = valid / jnp.sum(valid)

    def metric(tangent: Distribution) -> Distribution:
        return jax.tree.map(lambda x: weight.reshape(*weight.shape, *[1] * (x.ndim - 2)) * x, was.fisher_metric(tangent))

    fisher = curvature_product(lambda parameters: distribution(parameters, seen), flat, metric)
    loss, gradient = jax.value_and_grad(surrogate)(flat)
    direction = conjugate_gradient(lambda v: fisher(v) + config.cg_damping * v, -gradient, num_iterations=config.cg_iterations)
    step = trust_region_scale(direction, fisher(direction), max_divergence=config.max_kl) * direction

    def acceptable(scale: jax.Array) -> jax.Array:
        candidate = flat + scale * step
        return (surrogate(candidate) < loss) & (mean_kl(candidate) <= config.max_kl)

    scale, tries = backtracking_line_search(acceptable, factor=config.backtrack_factor, num_tries=config.backtrack_tries)
    moved = jnp.where(scale > 0, flat + scale * step, flat)
    return policy._replace(actor=unravel(moved)), {
        "policy_loss": surrogate(moved),
        "gradient_norm": jnp.linalg.norm(gradient),
        "step_scale": scale,
        "line_search_tries": tries,
        "constrained_kl": mean_kl(moved),
    }


def update(config: TRPO, state: State, rollout: Rollout, frozen: None, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
    """One iteration on a batch [T, N]: advantages, one step of the policy, epochs of the critic, and the audit of the step."""
    policy = state.acting
    before = estimate(config, policy, state.critic, state.return_scale, rollout)
    advantage = credit(config, before.advantage, rollout.time, rollout.valid, normalise_advantage=True)
    stepped, metrics = policy_step(config, policy, rollout, before.inputs, before.old, advantage)

    targets = ValueTargets(before.inputs.obs, before.features, before.value_target, rollout.valid)
    critic, critic_optimiser, critic_metrics = fit_critic(config, state.critic, state.critic_optimiser, targets, key)

    acting, return_scale, audit = conclude(config, stepped, state.return_scale, rollout, before)
    return State(acting, critic, critic_optimiser, return_scale), metrics | critic_metrics | audit
