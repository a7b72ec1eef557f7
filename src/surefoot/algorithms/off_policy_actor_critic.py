"""Off-policy actor-critic: a critic is fitted to replayed transitions, and the actor climbs it at the states of the replay.

Degris, White & Sutton 2012, arXiv:1205.4839: the gradient is sum_s d(s) sum_a grad pi(a|s) Q(s, a), d being the states visited.
Whoever acted, both sums over actions are of the policy as it is now: that, and r + gamma sum_a pi(a|s') Q'(s', a), to which Q is fitted
(Sutton & Barto 2018, eq. 6.9). They are exact for a single choice (Allen et al. 2017, arXiv:1709.00503), else means over fresh draws.
Targets of more steps correct for the policy that acted: Retrace (Munos et al. 2016, arXiv:1606.02647, eq. 4), or V-trace (Espeholt
et al. 2018, arXiv:1802.01561, section 4.2) for a critic of states, which can only judge the actions that were taken.
Left out: the weight of states that would make d the policy's own.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..audit import step_audit
from ..config import check_bounds, configuration, refuse_unread
from ..critics import row_values, taken_values
from ..distributions import Categorical, Distribution
from ..estimates import observe, state_values
from ..math.policy_gradient import expected_control_variate, importance_ratio, score_function_loss
from ..math.reduce import masked_mean, polyak
from ..math.returns import retrace, vtrace
from ..math.values import squared_value_loss, td_target
from ..minibatches import Metrics, clipped_adam, gradient_step
from ..pathwise import ActionCritic, ReplayActorCriticSettings, shape_of, start_optimisers
from ..policies import Actor, Critic, Inputs, StochasticPolicy, act, distributions_of
from ..replay import Replay, Sequences, draw_uniform, gradient_steps, insert, learn_once_started, sequences, start_replay
from ..types import EnvironmentSpec, Observation, PyTree, Rollout

__all__ = ["OffPolicyActorCritic", "State", "act", "init", "update"]


@configuration
class OffPolicyActorCritic(ReplayActorCriticSettings):
    """Off-policy actor-critic: a stochastic actor and a critic, both learned from replay."""

    learning_starts: int = 1_000
    """Transitions in the replay before the first gradient step."""
    critic_target: Literal["one_step", "retrace", "vtrace"] = "one_step"
    """What the critic is fitted to: one reward and Q, Retrace for Q, or V-trace for V."""
    sequence_length: int = 8
    """Steps in a row for Retrace and V-trace; must divide minibatch_size."""
    trace_decay: float = 1.0
    """Trace decay of Retrace and V-trace: 0 is one step, 1 as many as the ratios of the policies allow."""
    action_samples: int = 8
    """Actions drawn afresh at each state where Q is asked of actions other than a single choice, which is a sum."""
    entropy_coef: float = 0.01
    """Weight of the entropy bonus."""
    initial_log_std: float = 0.0
    """Logarithm of the standard deviation with which continuous actions, scaled to [-1, 1], are drawn at first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, sequence_length="[1, inf)", trace_decay="[0, 1]", action_samples="[2, inf)", entropy_coef="[0, inf)")
        refuse_unread(self)
        if self.minibatch_size % self.length:
            raise ValueError(f"sequence_length={self.sequence_length} must divide minibatch_size={self.minibatch_size}; choose a divisor.")

    @property
    def length(self) -> int:
        """Steps in a row that are drawn."""
        return 1 if self.critic_target == "one_step" else self.sequence_length

    @property
    def unread(self) -> dict[str, str]:
        """Settings that nothing reads as the others stand, and what would read them."""
        if self.critic_target == "one_step":
            return dict.fromkeys(("sequence_length", "trace_decay"), "critic_target='retrace' or 'vtrace'")
        return {"action_samples": "critic_target='one_step' or 'retrace'"} if self.critic_target == "vtrace" else {}


class State(NamedTuple):
    """Everything that learning changes."""

    acting: StochasticPolicy
    critic: ActionCritic | Critic  # of actions; of states for V-trace
    target_critic: ActionCritic | Critic
    optimisers: tuple[optax.OptState, optax.OptState]  # of the actor, of the critic
    replay: Replay


def init(config: OffPolicyActorCritic, spec: EnvironmentSpec, key: jax.Array) -> State:
    """Networks, a copy of the critic, optimisers and an empty replay; ValueError where rollouts do not fit."""
    gradient_steps(config, spec.num_envs)
    actor_key, critic_key = jax.random.split(key)
    spaces = spec.observation_space, spec.action_space
    actor = Actor(config.network, *spaces, actor_key, initial_log_std=config.initial_log_std, **shape_of(config))
    of_states = Critic(config.network, spec.observation_space, critic_key, **shape_of(config))
    critic = of_states if config.critic_target == "vtrace" else ActionCritic(config, spec, critic_key)
    replay = start_replay(spec, capacity=config.replay_size, num_steps=config.num_steps, keeps_log_prob=config.critic_target != "one_step")
    return State(StochasticPolicy(actor, None), critic, critic, start_optimisers(config, actor, critic), replay)


def at(actor: Actor, obs: Observation, action_mask: Any) -> Distribution:
    """The policy at rows [L, B]."""
    return distributions_of(actor, Inputs(obs, action_mask, None, None))


def sampled_values(config: Any, critic: Any, policy: Distribution, obs: Observation, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(actions drawn afresh [K, L, B, ...], Q of each [K, L, B])"""
    action = jax.vmap(policy.sample)(jax.random.split(key, config.action_samples))
    return action, jax.vmap(taken_values, (None, None, None, 0))(critic, obs, None, action)


def policy_values(config: OffPolicyActorCritic, critic: Any, policy: Distribution, obs: Observation, key: jax.Array) -> jax.Array:
    """V(s) [L, B] by a critic of states; by one of actions the mean of Q(s, a) under the policy, or of actions drawn from it."""
    if config.critic_target == "vtrace":
        return row_values(critic, obs, None)
    if isinstance(policy, Categorical):
        return expected_control_variate(policy.log_probs, row_values(critic, obs, None))
    return jnp.mean(sampled_values(config, critic, policy, obs, key)[1], axis=0)


def judge(config: OffPolicyActorCritic, actor: Actor, critic: Any, batch: Sequences, key: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """(what the critic is fitted to [L, B], the advantages of the actions taken by V-trace), as a critic and the actor see it."""
    obs, mask = jax.tree.map(lambda x: x[:-1], (batch.obs, batch.action_mask))
    next_obs, next_mask = jax.tree.map(lambda x: x[1:], (batch.obs, batch.action_mask))
    next_value = policy_values(config, critic, at(actor, next_obs, next_mask), next_obs, key)
    if config.critic_target == "one_step":
        return td_target(batch.reward, next_value, batch.terminated, discount=config.gamma), None
    ratio = importance_ratio(at(actor, obs, mask).log_prob(batch.action), batch.old_log_prob)
    rest = ratio, batch.terminated, batch.truncated
    decay = {"discount": config.gamma, "gae_lambda": config.trace_decay}
    if config.critic_target == "retrace":
        return retrace(batch.reward, taken_values(critic, obs, None, batch.action), next_value, *rest, **decay), None
    return vtrace(batch.reward, row_values(critic, obs, None), next_value, *rest, **decay)


def critic_loss(config: OffPolicyActorCritic, critic: Any, batch: Sequences, target: jax.Array) -> tuple[jax.Array, Metrics]:
    """Half the mean squared error at the rows that count."""
    obs = jax.tree.map(lambda x: x[:-1], batch.obs)
    is_of_states = config.critic_target == "vtrace"
    value = row_values(critic, obs, None) if is_of_states else taken_values(critic, obs, None, batch.action)
    loss = masked_mean(squared_value_loss(value, target), batch.valid)
    return loss, {"critic_loss": loss, "state_value" if is_of_states else "action_value": masked_mean(value, batch.valid)}


def actor_loss(
    config: OffPolicyActorCritic, actor: Actor, critic: Any, batch: Sequences, advantage: jax.Array | None, key: jax.Array
) -> tuple[jax.Array, Metrics]:
    """Minus what has the gradient sum_a grad pi(a|s) Q(s, a) at the rows that count, and minus the entropy bonus."""
    obs, mask = jax.tree.map(lambda x: x[:-1], (batch.obs, batch.action_mask))
    policy = at(actor, obs, mask)
    if advantage is not None:
        each = score_function_loss(policy.log_prob(batch.action), advantage)
    elif isinstance(policy, Categorical):
        each = -expected_control_variate(policy.log_probs, row_values(critic, obs, None))
    else:
        action, value = sampled_values(config, critic, jax.lax.stop_gradient(policy), obs, key)
        less_the_others = (value - jnp.mean(value, axis=0)) * len(value) / (len(value) - 1)
        each = jnp.mean(score_function_loss(jax.vmap(policy.log_prob)(action), less_the_others), axis=0)
    loss = masked_mean(each - config.entropy_coef * policy.entropy(), batch.valid)
    return loss, {"policy_loss": loss}


def foreseen_advantage(config: OffPolicyActorCritic, state: State, rollout: Rollout, old: Distribution, key: jax.Array) -> jax.Array:
    """What the critic says of each row [T, N] before the iteration: Q(s, a) - V(s), or the TD error."""
    if config.critic_target != "vtrace":
        value = policy_values(config, state.critic, old, rollout.obs, key)
        return taken_values(state.critic, rollout.obs, None, rollout.action) - value
    value, next_value = state_values(state.acting, state.critic, rollout, observe(state.acting, rollout)[1])
    return td_target(rollout.reward, next_value, rollout.terminated, discount=config.gamma) - value


def update(config: OffPolicyActorCritic, state: State, rollout: Rollout, frozen: None, key: jax.Array) -> tuple[State, Metrics]:
    """Store a rollout [T, N], take gradient steps of critic and actor on minibatches from the replay, and audit them on the rollout."""
    draw_key, step_key, audit_key = jax.random.split(key, 3)
    old = at(state.acting.actor, rollout.obs, rollout.action_mask)
    acted = old if rollout.acting is None else at(rollout.acting.actor, rollout.obs, rollout.action_mask)
    replay = insert(state.replay, rollout, None if config.critic_target == "one_step" else acted.log_prob(rollout.action))
    steps, optimiser = gradient_steps(config, rollout.reward.shape[1]), clipped_adam(config)
    index = draw_uniform(replay, draw_key, (steps, config.minibatch_size // config.length))
    batches = jax.vmap(lambda index: sequences(replay, index, length=config.length))(index)

    def step(carry: PyTree, minibatch: tuple[Sequences, jax.Array]) -> tuple[PyTree, tuple[dict[str, jax.Array], None]]:
        actor, critic, target_critic, (actor_moments, critic_moments) = carry
        batch, key = minibatch
        target_key, own_key = jax.random.split(key)
        target, advantage = judge(config, actor, target_critic, batch, target_key)
        (critic, critic_moments), of_critic = gradient_step(
            lambda critic: critic_loss(config, critic, batch, target), critic, critic_moments, optimiser, config.critic_learning_rate
        )

        def loss(actor: Actor) -> tuple[jax.Array, Metrics]:
            return actor_loss(config, actor, critic, batch, advantage, own_key)

        (actor, actor_moments), of_actor = gradient_step(loss, actor, actor_moments, optimiser, config.actor_learning_rate)
        target_critic = polyak(target_critic, critic, rate=config.target_rate)
        metrics = of_critic | {"critic_gradient_norm": of_critic.pop("gradient_norm")} | of_actor
        return (actor, critic, target_critic, (actor_moments, critic_moments)), (metrics, None)

    start = state.acting.actor, state.critic, state.target_critic, state.optimisers
    _, (actor, *others), (metrics, _) = learn_once_started(config, replay, step, start, (batches, jax.random.split(step_key, steps)))
    foreseen = foreseen_advantage(config, state, rollout, old, audit_key)
    if rollout.acting is not None:  # what `old` would have done is foreseen from what was done in its place
        foreseen = foreseen * importance_ratio(old.log_prob(rollout.action), acted.log_prob(rollout.action))
    audit = step_audit(old, at(actor, rollout.obs, rollout.action_mask), rollout, foreseen, discount=config.gamma)
    return State(state.acting._replace(actor=actor), *others, replay), metrics | audit | {"replay_size": replay.size}
