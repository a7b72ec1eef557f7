"""Actor-critic: fit a critic to what happened, and take one gradient step along the advantages that it sees.

Konda & Tsitsiklis 2000; Sutton & Barto 2018, section 13.5. The critics of states and of actions are fitted to one target,
Monte Carlo or TD, and the advantage is Q(s, a) - V(s). Without a critic of actions r + gamma V(s') stands for Q(s, a), and the
advantage is the TD error; without one of states V(s) is the policy's mean of Q(s, a).
With `control_variate` the critic of actions judges none of them: it takes variance out of the sampled advantage, and what its mean
under the policy has of the gradient is added exactly, so that the gradient is right whatever it says (Gu et al. 2017,
arXiv:1611.02247, section 3.1; Liu et al. 2018, arXiv:1710.11198). The mean is a sum over choices, or of Q to first order in the action.
One rule gives both forms: a batch is `num_steps` of every environment. With `num_steps=1, critic_epochs=1, fit_first=False` it is
the one-step actor-critic of Sutton & Barto's box, online: one TD error moves V and the policy at each step of N environments.
Left out: a factor before the control variate that adapts to how well it fits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from ..audit import conclude
from ..config import check_bounds, configuration
from ..critics import ValueTargets, critic_optimiser, fit_critic, of_actions, refuse_shared_trunk, row_values, taken_values
from ..distributions import DiagonalGaussian, Distribution
from ..estimates import Estimates, credit, observe, rows_and_successors
from ..math.policy_gradient import action_dependent_advantage, expected_control_variate, linear_control_variate, score_function_loss
from ..math.reduce import masked_mean
from ..math.returns import lambda_return
from ..math.values import td_target
from ..minibatches import check_minibatch, gradient_step
from ..normalise import ReturnScale, start_return_scale
from ..pathwise import ActionCritic
from ..policies import ActorCriticSettings, Critic, Inputs, StochasticPolicy, act, actor_and_critic, critic_of_actions, distributions_of
from ..types import EnvironmentSpec, Observation, Rollout

__all__ = ["ActorCritic", "State", "act", "init", "update"]


@configuration
class ActorCritic(ActorCriticSettings):
    """Actor-critic with critics of states, of actions, or both; online with `num_steps=1`."""

    gamma: float = 0.99
    """Discount factor."""
    critic: Literal["value", "action_value", "both"] = "value"
    """What is learned: V(s), or Q(s, a), or both; Q alone for Discrete actions only."""
    control_variate: bool = False
    """Where both are learned: credit an action with its target less V(s), and let Q take variance out of that without bias."""
    target: Literal["monte_carlo", "td"] = "td"
    """What critics are fitted to: all rewards of the episode that the batch shows, or the next one; and the value of what comes then."""
    fit_first: bool = True
    """Fit the critics to a batch before they judge it. Otherwise they judge it as earlier batches left them, free of its noise."""
    num_steps: int = 16
    """Steps of each environment in one batch, and so in one gradient step of the actor; 1 is the online form."""
    learning_rate: float = 1e-3
    """Step size of the actor's Adam."""
    critic_epochs: int = 10
    """Passes of each critic over each batch."""
    minibatch_size: int | None = None
    """Transitions in one gradient step of a critic; must divide num_steps times the number of environments. By default the whole batch."""
    critic_learning_rate: float = 1e-3
    """Step size of each critic's Adam."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, gamma="[0, 1]", num_steps="[1, inf)", learning_rate="(0, inf)")
        check_bounds(self, critic_epochs="[1, inf)", minibatch_size="[1, inf)", critic_learning_rate="(0, inf)")
        refuse_shared_trunk(self)
        if self.control_variate and (self.critic != "both" or self.fit_first):
            raise ValueError(
                "control_variate=True wants a critic of actions beside one of states, fitted to earlier batches alone; "
                "set critic='both' and fit_first=False too."
            )


class State(NamedTuple):
    """Everything that learning changes."""

    acting: StochasticPolicy
    critic: Critic | None  # of states
    action_critic: Critic | None
    optimiser: optax.OptState
    critic_optimiser: optax.OptState | None
    action_critic_optimiser: optax.OptState | None
    return_scale: ReturnScale | None  # None where rewards are not normalised


def init(config: ActorCritic, spec: EnvironmentSpec, key: jax.Array) -> State:
    """Parameters, optimisers and statistics before the first step; ValueError for spaces or a minibatch that do not fit."""
    check_minibatch(config, spec.num_envs)
    check_actions(config, spec.action_space)
    policy, critic = actor_and_critic(config, spec, key)
    action_critic = None if config.critic == "value" else critic_of_actions(config, spec, jax.random.fold_in(key, 1))
    return State(
        acting=policy,
        critic=critic if config.critic != "action_value" else None,
        action_critic=action_critic,
        optimiser=optax.scale_by_adam().init(ravel_pytree(policy.actor)[0]),
        critic_optimiser=critic_optimiser(config, critic) if config.critic != "action_value" else None,
        action_critic_optimiser=None if action_critic is None else critic_optimiser(config, action_critic),
        return_scale=start_return_scale(config, spec.num_envs),
    )


def check_actions(config: ActorCritic, space: gymnasium.Space[Any]) -> None:
    """Raise a ValueError where the mean of Q over the policy is needed and cannot be had."""
    if config.critic == "action_value" and not isinstance(space, gymnasium.spaces.Discrete):
        raise ValueError(
            f"critic='action_value' values a state by a sum over all actions, which needs a Discrete action space, and this is {space}; "
            "use critic='both' or 'value'."
        )
    if config.control_variate and not isinstance(space, gymnasium.spaces.Discrete | gymnasium.spaces.Box):
        raise ValueError(
            f"control_variate=True needs the mean of Q, which is a sum for a Discrete action space, linear in the action for a Box, and "
            f"neither for {space}; leave it at False."
        )


class Judgement(NamedTuple):
    """What the critics say of a batch, [T, N]."""

    value: jax.Array  # V(s)
    next_value: jax.Array  # V of the true successor
    action_value: jax.Array | None  # Q(s, a) of the action taken; None without a critic of actions


def judge(
    policy: StochasticPolicy, critic: Critic | None, action_critic: Critic | None, rollout: Rollout, inputs: Inputs, features: jax.Array
) -> Judgement:
    """V by the critic of states, or else as the mean of Q under the policy: V(s) = sum_a pi(a|s) Q(s, a)."""

    def state_value(obs: Observation, features: jax.Array, action_mask: Any) -> jax.Array:
        if critic is not None:
            return critic(obs, features)
        return jnp.sum(jnp.exp(policy.actor.choose(features, action_mask).log_probs) * action_critic(obs, features))

    value, next_value = rows_and_successors(state_value, policy, rollout, features)
    if action_critic is None:
        return Judgement(value, next_value, None)
    return Judgement(value, next_value, taken_values(action_critic, inputs.obs, features, rollout.action))


def advantage_of(config: ActorCritic, judgement: Judgement, reward: jax.Array, terminated: jax.Array, target: jax.Array) -> jax.Array:
    """Q(s, a) - V(s), Q by its critic, or sampled: without one r + gamma V(s'), and where it is a control variate the target."""
    action_value = target if config.control_variate else judgement.action_value
    if action_value is None:
        action_value = td_target(reward, judgement.next_value, terminated, discount=config.gamma)
    return action_value - judgement.value


Mean = Callable[[Distribution], jax.Array]


def control_variate(
    action_critic: Critic | ActionCritic, old: Distribution, inputs: Inputs, features: jax.Array, action: jax.Array
) -> tuple[jax.Array, Mean]:
    """(c(s, a) of the actions taken [T, N], its mean under a policy): Q of each choice, or Q to first order at the mean of a normal."""
    if isinstance(old, DiagonalGaussian):
        slope = jax.grad(lambda mean: jnp.sum(taken_values(action_critic, inputs.obs, features, mean)))(old.mean)
        return linear_control_variate(action, old.mean, slope), lambda policy: linear_control_variate(policy.mean, old.mean, slope)
    values = row_values(action_critic, inputs.obs, features)
    return of_actions(values, action), lambda policy: expected_control_variate(policy.log_probs, values)


def fit(
    config: ActorCritic, critic: Critic | None, moments: optax.OptState, targets: ValueTargets, key: jax.Array
) -> tuple[Critic | None, optax.OptState, dict[str, jax.Array]]:
    """`fit_critic`, where there is one to fit."""
    return (None, None, {}) if critic is None else fit_critic(config, critic, moments, targets, key)


def update(config: ActorCritic, state: State, rollout: Rollout, frozen: None, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
    """One iteration on a batch [T, N]: targets, critics, advantages, one step of the policy, and the audit of the step."""
    policy, flags = state.acting, (rollout.terminated, rollout.truncated)
    scale = state.return_scale.scale() if state.return_scale is not None else jnp.ones(())
    reward, (inputs, features) = rollout.reward / scale, observe(policy, rollout)

    before = judge(policy, state.critic, state.action_critic, rollout, inputs, features)
    trace_decay = 1.0 if config.target == "monte_carlo" else 0.0
    target = lambda_return(reward, before.next_value, *flags, discount=config.gamma, trace_decay=trace_decay)
    targets = ValueTargets(inputs.obs, features, target, rollout.valid)
    critic, fitting, metrics = fit(config, state.critic, state.critic_optimiser, targets, key)
    targets = targets._replace(action=rollout.action)
    action_critic, action_fitting, more = fit(config, state.action_critic, state.action_critic_optimiser, targets, key)
    metrics |= {f"action_{name}": value for name, value in more.items()}

    judgement = judge(policy, critic, action_critic, rollout, inputs, features) if config.fit_first else before
    advantage = advantage_of(config, judgement, reward, rollout.terminated, target)
    old, left, mean_of = distributions_of(policy.actor, inputs), advantage, None
    if config.control_variate:
        taken, mean_of = control_variate(state.action_critic, old, inputs, features, rollout.action)
        left = action_dependent_advantage(advantage, taken, mean_of(old))
    weigh = partial(credit, config, time=rollout.time, valid=rollout.valid, normalise_advantage=False)
    flat, unravel = ravel_pytree(policy.actor)

    def loss(flat: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        new = distributions_of(unravel(flat), inputs)
        each = score_function_loss(new.log_prob(rollout.action), weigh(left))
        if mean_of is not None:
            each = each - weigh(mean_of(new))
        policy_loss = masked_mean(each, rollout.valid)
        return policy_loss, {"policy_loss": policy_loss}

    (flat, moments), step_metrics = gradient_step(loss, flat, state.optimiser, optax.scale_by_adam(), config.learning_rate)

    # Where the only rows are those of a reset there is nothing to learn from, and Adam's momentum alone must not move anything.
    learned = policy._replace(actor=unravel(flat)), critic, action_critic, moments, fitting, action_fitting
    moved, *rest = jax.tree.map(lambda new, old: jnp.where(jnp.any(rollout.valid), new, old), learned, tuple(state[:-1]))
    value = before.value if before.action_value is None else before.action_value
    estimates = Estimates(inputs, features, old, value, advantage, target, scale)
    acting, return_scale, audit = conclude(config, moved, state.return_scale, rollout, estimates)
    return State(acting, *rest, return_scale), metrics | step_metrics | audit
