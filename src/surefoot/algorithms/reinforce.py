"""REINFORCE: raise the probability of actions in proportion to what was earned after them, over whole episodes.

Williams 1992, "Simple statistical gradient-following algorithms", eq. 11, with the baseline of section 3. The weights that
let a batch be used more than once are those of Precup, Sutton & Singh 2000, section 3. Only episodes that have ended count,
and the mean is over episodes; rows of unfinished ones wait in the state, at most `window` of them per environment.
Left out: a bootstrap at a time limit unless there is a learned value.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..audit import conclude
from ..config import check_bounds, configuration
from ..critics import ValueTargets, critic_optimiser, fit_critic, refuse_shared_trunk
from ..estimates import Estimates, observe, state_values
from ..math.episodes import episode_sum
from ..math.policy_gradient import clip_weight, score_function_loss, self_normalise, step_importance_weight, trajectory_importance_weight
from ..math.reduce import masked_mean
from ..math.returns import reward_to_go, time_discount, total_return
from ..minibatches import check_minibatch
from ..normalise import Moments, ReturnScale, normalise, start_return_scale
from ..policies import Actor, ActorCriticSettings, Critic, Inputs, StochasticPolicy, act, actor_and_critic, distributions_of
from ..types import EnvironmentSpec, PyTree, Rollout
from ..waiting import Rows, empty_window, join, mean_of_others, rows_of

__all__ = ["REINFORCE", "State", "act", "init", "update"]


@configuration
class REINFORCE(ActorCriticSettings):
    """The score-function policy gradient on whole episodes."""

    gamma: float = 0.99
    """Discount factor."""
    credit: Literal["total", "reward_to_go"] = "reward_to_go"
    """What an action is credited with: the whole episode's return, or what came after it."""
    discounting: Literal["reward_to_go", "objective"] = "reward_to_go"
    """Discount within the reward-to-go only, as is customary, or weigh each step by gamma^t too: the true discounted gradient."""
    baseline: Literal["none", "mean", "leave_one_out", "value"] = "value"
    """What is subtracted: nothing, the mean credit of earlier batches, that of the batch's other episodes, or a learned V(s)."""
    epochs: int = 1
    """Gradient steps on each batch; more than one wants importance weights."""
    importance: Literal["none", "trajectory", "per_step"] = "none"
    """Correct for the policy having moved: by the ratio of whole episodes, or of their steps up to each reward."""
    self_normalised: bool = False
    """Divide importance weights by their mean over the batch."""
    max_weight: float | None = None
    """Largest importance weight; unlimited by default."""
    normalise_advantage: bool = True
    """Divide advantages by their root mean square over the batch, which leaves their mean where it is."""
    num_steps: int = 256
    """Steps of each environment in one batch."""
    window: int = 1000
    """Rows of unfinished episodes kept per environment; an episode longer than this and a batch together is left out."""
    learning_rate: float = 3e-3
    """Step size of the actor's Adam."""
    critic_epochs: int = 10
    """Passes of the critic over each batch, where the baseline is 'value'."""
    minibatch_size: int = 64
    """Transitions in one gradient step of the critic; must divide num_steps times the number of environments."""
    critic_learning_rate: float = 1e-3
    """Step size of the critic's Adam."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, gamma="[0, 1]", epochs="[1, inf)", max_weight="(0, inf)", num_steps="[1, inf)", window="[0, inf)")
        check_bounds(self, learning_rate="(0, inf)", critic_epochs="[1, inf)", minibatch_size="[1, inf)", critic_learning_rate="(0, inf)")
        refuse_shared_trunk(self)
        refuse_state_discount(self)
        if self.memory != "none":
            raise ValueError("reinforce keeps rows of unfinished episodes without what was remembered there; use a2c or ppo with a memory.")
        if self.credit == "total" and self.discounting == "objective":
            raise ValueError("discounting='objective' weighs steps of the reward-to-go; a total return is discounted from the start.")
        if self.credit == "total" and self.importance == "per_step":
            raise ValueError("importance='per_step' is biased for rewards that precede the step; set credit='reward_to_go'.")
        if self.importance == "none" and (self.self_normalised or self.max_weight is not None):
            raise ValueError("self_normalised and max_weight shape importance weights; set importance to 'trajectory' or 'per_step'.")


def refuse_state_discount(config: REINFORCE) -> None:
    """Raise a ValueError for the name under which the methods whose batches cut episodes have `discounting`."""
    if config.state_discount:
        raise ValueError("state_discount is for methods whose batches cut episodes; reinforce has discounting='objective' for it.")


class State(NamedTuple):
    """Everything that learning changes."""

    acting: StochasticPolicy
    critic: Critic
    optimiser: optax.OptState
    critic_optimiser: optax.OptState
    return_scale: ReturnScale | None  # None where rewards are not normalised
    mean_credit: Moments  # of earlier batches
    waiting: Rows  # [window, N, ...]


def init(config: REINFORCE, spec: EnvironmentSpec, key: jax.Array) -> State:
    """Parameters, optimisers and statistics before the first step; ValueError for a minibatch that does not fit the batch."""
    check_minibatch(config, spec.num_envs)
    policy, critic = actor_and_critic(config, spec, key)
    return State(
        acting=policy,
        critic=critic,
        optimiser=optax.adam(config.learning_rate).init(policy.actor),
        critic_optimiser=critic_optimiser(config, critic),
        return_scale=start_return_scale(config, spec.num_envs),
        mean_credit=Moments.start(()),
        waiting=empty_window(spec, config.window),
    )


def credits(config: REINFORCE, rows: Rows, reward: jax.Array) -> jax.Array:
    """What each row [T, N] is credited with, before any baseline."""
    flags = rows.terminated, rows.truncated
    if config.credit == "total":
        return total_return(reward, rows.time, *flags, discount=config.gamma)
    return reward_to_go(reward, jnp.zeros_like(reward), *flags, discount=config.gamma)


def baselines(config: REINFORCE, mean_credit: jax.Array, rows: Rows, credit: jax.Array, used: jax.Array) -> jax.Array:
    """What is subtracted from the credit of each row [T, N]; none depends on the row's own episode's actions from there on."""
    if config.baseline == "value":
        return rows.value
    if config.baseline == "leave_one_out":
        own = (episode_sum(jnp.where(used, x, 0), rows.terminated, rows.truncated) for x in (credit, jnp.ones_like(credit)))
        return mean_of_others(credit, *own, used)
    return jnp.broadcast_to(mean_credit if config.baseline == "mean" else 0.0, credit.shape)


def loss(config: REINFORCE, policy: StochasticPolicy, rows: Rows, baseline: jax.Array, used: jax.Array) -> jax.Array:
    """Minus the gradient's objective: the mean over episodes of the sum over steps, at the rows `used`."""
    seen = Inputs(normalise(policy.normaliser, rows.obs), rows.action_mask, rows.time, None)
    log_prob = distributions_of(policy.actor, seen).log_prob(rows.action)
    log_prob = jnp.where(used, log_prob, rows.old_log_prob)
    flags, ended = (rows.terminated, rows.truncated), rows.terminated | rows.truncated
    weight = jnp.ones_like(log_prob)
    if config.importance != "none":
        weigh = trajectory_importance_weight if config.importance == "trajectory" else step_importance_weight
        weight = jax.lax.stop_gradient(weigh(log_prob, rows.old_log_prob, *flags))
        if config.max_weight is not None:
            weight = clip_weight(weight, maximum=config.max_weight)
        if config.self_normalised:  # an episode is one sample, and so is a step with a weight of its own
            weight = self_normalise(weight, used & ended if config.importance == "trajectory" else used)
    if config.importance == "per_step":  # each reward by the ratio up to it; a baseline by that of what led to its state
        advantage = credits(config, rows, weight * rows.reward) - weight * baseline
    else:
        advantage = weight * (credits(config, rows, rows.reward) - baseline)
    if config.normalise_advantage:
        advantage = advantage / (jnp.sqrt(masked_mean(advantage**2, used)) + 1e-8)
    if config.discounting == "objective":
        advantage = time_discount(rows.time, discount=config.gamma) * advantage
    return jnp.sum(score_function_loss(log_prob, jnp.where(used, advantage, 0))) / jnp.maximum(jnp.sum(used & ended), 1)


def update(config: REINFORCE, state: State, rollout: Rollout, frozen: None, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
    """One iteration on a batch [T, N]: credit, gradient steps on the episodes that ended, the critic, and the audit."""
    policy, flags = state.acting, (rollout.terminated, rollout.truncated)
    scale = state.return_scale.scale() if state.return_scale is not None else jnp.ones(())
    reward = jnp.where(rollout.valid, rollout.reward / scale, 0)
    inputs, features = observe(policy, rollout)
    value, next_value = state_values(policy, state.critic, rollout, features)
    if config.baseline != "value":
        value, next_value = jnp.zeros_like(value), jnp.zeros_like(value)
    old = distributions_of(policy.actor, inputs)
    following = jnp.where(rollout.truncated & ~rollout.terminated, config.gamma * next_value, 0)
    arrived = rows_of(rollout, reward + following, old.log_prob(rollout.action), value)
    rows, waiting, used = join(state.waiting, arrived)
    credit = credits(config, rows, rows.reward)
    baseline = baselines(config, state.mean_credit.mean, rows, credit, used)

    def step(carry: PyTree, _: None) -> tuple[PyTree, dict[str, jax.Array]]:
        actor, moments = carry

        def objective(actor: Actor) -> jax.Array:
            return loss(config, policy._replace(actor=actor), rows, baseline, used)

        policy_loss, gradient = jax.value_and_grad(objective)(actor)
        change, moments = optax.adam(config.learning_rate).update(gradient, moments)
        moved = optax.apply_updates(actor, change), moments
        # Where no episode has ended there is nothing to learn from, and Adam's momentum alone must not move the policy.
        carry = jax.tree.map(lambda new, old: jnp.where(jnp.any(used), new, old), moved, carry)
        return carry, {"policy_loss": policy_loss, "gradient_norm": optax.tree.norm(gradient)}

    (actor, moments), every = jax.lax.scan(step, (policy.actor, state.optimiser), None, length=config.epochs)
    target = reward_to_go(reward, next_value, *flags, discount=config.gamma)
    metrics, critic, fitting = jax.tree.map(lambda x: x[-1], every), state.critic, state.critic_optimiser
    if config.baseline == "value":
        targets = ValueTargets(inputs.obs, features, target, rollout.valid)
        critic, fitting, critic_metrics = fit_critic(config, critic, fitting, targets, key)
        metrics |= critic_metrics
    before = Estimates(inputs, features, old, value, target - value, target, scale)
    acting, return_scale, audit = conclude(config, policy._replace(actor=actor), state.return_scale, rollout, before)
    metrics |= audit | {"episodes_used": jnp.sum(used & (rows.terminated | rows.truncated))}
    return State(acting, critic, moments, fitting, return_scale, state.mean_credit.update(credit, used), waiting), metrics
