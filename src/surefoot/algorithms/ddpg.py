"""Deep deterministic policy gradient: a deterministic actor follows the gradient of a critic that is learned from replay.

Lillicrap et al. 2016, arXiv:1509.02971, algorithm 1: the critic is fitted to r + gamma Q'(s', mu'(s')) with slowly following
copies Q' and mu', the actor ascends Q(s, mu(s)) (Silver et al. 2014, eq. 9). Noise is normal, as in the later literature, in
place of the paper's Ornstein-Uhlenbeck process; weight decay and batch normalisation are left out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..config import check_bounds, configuration
from ..math.reduce import polyak
from ..math.values import n_step_target, squared_value_loss
from ..minibatches import clipped_adam, gradient_step
from ..pathwise import (
    ActionCritic,
    DeterministicActing,
    DeterministicActor,
    ReplayActorCriticSettings,
    draw_batches,
    start_optimisers,
)
from ..pathwise import act_with_noise as act
from ..replay import Replay, Transitions, gradient_steps, insert, learn_once_started, start_replay
from ..types import EnvironmentSpec, PyTree, Rollout

__all__ = ["DDPG", "State", "act", "init", "update"]


@configuration
class DDPG(ReplayActorCriticSettings):
    """Deep deterministic policy gradient."""

    exploration_noise: float = 0.1
    """Standard deviation of the noise on actions, scaled to [-1, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, exploration_noise="[0, inf)")


class State(NamedTuple):
    """Everything that learning changes."""

    acting: DeterministicActing
    critic: ActionCritic
    target_actor: DeterministicActor
    target_critic: ActionCritic
    optimisers: tuple[optax.OptState, optax.OptState]  # of the actor, of the critic
    replay: Replay


def init(config: DDPG, spec: EnvironmentSpec, key: jax.Array) -> State:
    """Networks, their copies, optimisers and an empty replay; ValueError where actions are not continuous, or rollouts do not fit."""
    gradient_steps(config, spec.num_envs)
    actor_key, critic_key = jax.random.split(key)
    actor, critic = DeterministicActor(config, spec, actor_key), ActionCritic(config, spec, critic_key)
    optimisers = start_optimisers(config, actor, critic)
    replay = start_replay(spec, capacity=config.replay_size, num_steps=config.num_steps)
    return State(DeterministicActing(actor, jnp.ones((), bool)), critic, actor, critic, optimisers, replay)


def critic_loss(critic: ActionCritic, target_actor: Any, target_critic: Any, batch: Transitions) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Lillicrap et al. 2016, algorithm 1: the mean squared error against y."""
    next_value = jax.vmap(target_critic)(batch.next_obs, jax.vmap(target_actor)(batch.next_obs))
    value = jax.vmap(critic)(batch.obs, batch.action)
    loss = jnp.mean(squared_value_loss(value, n_step_target(batch.reward, next_value, batch.discount)))
    return loss, {"critic_loss": loss, "action_value": jnp.mean(value)}


def actor_loss(actor: DeterministicActor, critic: ActionCritic, batch: Transitions) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Silver et al. 2014, eq. 9: minus the value of the actor's own actions."""
    loss = -jnp.mean(jax.vmap(critic)(batch.obs, jax.vmap(actor)(batch.obs)))
    return loss, {"actor_loss": loss}


def update(config: DDPG, state: State, rollout: Rollout, frozen: None, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
    """Store a rollout [T, N], then take gradient steps of critic and actor on minibatches from the replay."""
    replay = insert(state.replay, rollout)
    batches, _ = draw_batches(config, replay, key, rollout.reward.shape[1])
    optimiser = clipped_adam(config)

    def step(carry: PyTree, batch: Transitions) -> tuple[PyTree, tuple[dict[str, jax.Array], None]]:
        actor, critic, *targets, (actor_moments, critic_moments) = carry
        (critic, critic_moments), of_critic = gradient_step(
            lambda critic: critic_loss(critic, *targets, batch),
            critic,
            critic_moments,
            optimiser,
            config.critic_learning_rate,
        )
        (actor, actor_moments), of_actor = gradient_step(
            lambda actor: actor_loss(actor, critic, batch), actor, actor_moments, optimiser, config.actor_learning_rate
        )
        targets = polyak(tuple(targets), (actor, critic), rate=config.target_rate)
        metrics = of_critic | {"critic_gradient_norm": of_critic.pop("gradient_norm")} | of_actor
        return (actor, critic, *targets, (actor_moments, critic_moments)), (metrics, None)

    start = state.acting.actor, state.critic, state.target_actor, state.target_critic, state.optimisers
    started, carry, (metrics, _) = learn_once_started(config, replay, step, start, batches)
    actor, *others = carry
    return State(DeterministicActing(actor, ~started), *others, replay), metrics | {"replay_size": replay.size}
