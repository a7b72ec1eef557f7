"""Twin delayed deterministic policy gradient: DDPG with three measures against a critic that promises too much.

Fujimoto et al. 2018, arXiv:1802.09477, algorithm 1: the smaller of two critics is the target (eq. 10), the target's action is
smoothed by clipped noise (eq. 14), and the actor moves, with all targets, after every second step of the critics only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..config import check_bounds, configuration
from ..math.reduce import polyak
from ..math.values import n_step_target, squared_value_loss, twin_minimum
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

__all__ = ["TD3", "State", "act", "init", "update"]


@configuration
class TD3(ReplayActorCriticSettings):
    """Twin delayed deterministic policy gradient."""

    exploration_noise: float = 0.1
    """Standard deviation of the noise on actions, scaled to [-1, 1]."""
    policy_delay: int = 2
    """Gradient steps of the critics for each of the actor and the targets."""
    target_noise: float = 0.2
    """Standard deviation of the noise on the target's actions."""
    target_noise_clip: float = 0.5
    """The largest noise on the target's actions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, exploration_noise="[0, inf)", policy_delay="[1, inf)", target_noise="[0, inf)", target_noise_clip="[0, inf)")


class State(NamedTuple):
    """Everything that learning changes."""

    acting: DeterministicActing
    critics: tuple[ActionCritic, ActionCritic]
    target_actor: DeterministicActor
    target_critics: tuple[ActionCritic, ActionCritic]
    optimisers: tuple[optax.OptState, optax.OptState]  # of the actor, of the critics
    num_updates: jax.Array  # [] int32
    replay: Replay


def init(config: TD3, spec: EnvironmentSpec, key: jax.Array) -> State:
    """Networks, their copies, optimisers and an empty replay; ValueError where actions are not continuous, or rollouts do not fit."""
    gradient_steps(config, spec.num_envs)
    actor_key, *critic_keys = jax.random.split(key, 3)
    actor, critics = DeterministicActor(config, spec, actor_key), tuple(ActionCritic(config, spec, key) for key in critic_keys)
    optimisers = start_optimisers(config, actor, critics)
    replay = start_replay(spec, capacity=config.replay_size, num_steps=config.num_steps)
    return State(DeterministicActing(actor, jnp.ones((), bool)), critics, actor, critics, optimisers, jnp.zeros((), jnp.int32), replay)


def values_of(critics: Any, obs: Any, action: jax.Array) -> jax.Array:
    """[2, B]"""
    return jnp.stack([jax.vmap(critic)(obs, action) for critic in critics])


def target_of(config: TD3, target_actor: Any, target_critics: Any, batch: Transitions, key: jax.Array) -> jax.Array:
    """[B] what both critics are fitted to: Fujimoto et al. 2018, eq. 14 with the minimum of eq. 10."""
    action = jax.vmap(target_actor)(batch.next_obs)
    noise = config.target_noise * jax.random.normal(key, action.shape)
    noise = jnp.clip(noise, -config.target_noise_clip, config.target_noise_clip)
    values = values_of(target_critics, batch.next_obs, jnp.clip(action + noise, -1.0, 1.0))
    return n_step_target(batch.reward, twin_minimum(values), batch.discount)


def critic_loss(critics: Any, target: jax.Array, batch: Transitions) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The mean squared errors of both critics."""
    values = values_of(critics, batch.obs, batch.action)
    loss = jnp.mean(jnp.sum(squared_value_loss(values, jnp.broadcast_to(target, values.shape)), axis=0))
    return loss, {"critic_loss": loss, "action_value": jnp.mean(values)}


def actor_loss(actor: DeterministicActor, critic: ActionCritic, batch: Transitions) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Silver et al. 2014, eq. 9: minus the first critic's value of the actor's own actions."""
    loss = -jnp.mean(jax.vmap(critic)(batch.obs, jax.vmap(actor)(batch.obs)))
    return loss, {"actor_loss": loss}


def update(config: TD3, state: State, rollout: Rollout, frozen: None, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
    """Store a rollout [T, N], then take gradient steps of critics, and now and then of the actor, on minibatches from the replay."""
    replay = insert(state.replay, rollout)
    minibatches = draw_batches(config, replay, key, rollout.reward.shape[1])
    optimiser = clipped_adam(config)

    def step(carry: PyTree, minibatch: tuple[Transitions, jax.Array]) -> tuple[PyTree, tuple[dict[str, jax.Array], None]]:
        late, critics, critic_moments, count = carry
        batch, key = minibatch
        target = target_of(config, *late[2], batch, key)
        (critics, critic_moments), of_critic = gradient_step(
            lambda critics: critic_loss(critics, target, batch), critics, critic_moments, optimiser, config.critic_learning_rate
        )

        def move(late: PyTree) -> tuple[PyTree, dict[str, jax.Array]]:
            actor, moments, targets = late
            (actor, moments), metrics = gradient_step(
                lambda actor: actor_loss(actor, critics[0], batch), actor, moments, optimiser, config.actor_learning_rate
            )
            return (actor, moments, polyak(targets, (actor, critics), rate=config.target_rate)), metrics

        # A loop of one step or none copies nothing, as the branches of a `cond` would.
        count = count + 1
        nothing = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan), jax.eval_shape(move, late)[1])
        times = (count % config.policy_delay == 0).astype(jnp.int32)
        late, of_actor = jax.lax.fori_loop(0, times, lambda _, before: move(before[0]), (late, nothing))
        metrics = of_critic | {"critic_gradient_norm": of_critic.pop("gradient_norm")} | of_actor
        return (late, critics, critic_moments, count), (metrics, None)

    actor_moments, critic_moments = state.optimisers
    targets = state.target_actor, state.target_critics
    start = (state.acting.actor, actor_moments, targets), state.critics, critic_moments, state.num_updates
    started, carry, (metrics, _) = learn_once_started(config, replay, step, start, minibatches)
    (actor, actor_moments, targets), critics, critic_moments, count = carry
    acting = DeterministicActing(actor, ~started)
    learned = State(acting, critics, *targets, (actor_moments, critic_moments), count, replay)
    return learned, metrics | {"replay_size": replay.size}
