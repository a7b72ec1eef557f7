"""Soft actor-critic: the return and the entropy of the policy are maximised together, from replay.

Haarnoja et al. 2018, arXiv:1812.05905, algorithm 1: two critics are fitted to r + gamma V(s') with the soft value
V(s) = E_a[min Q(s, a) - alpha log pi(a|s)] of their slow copies (eq. 3 and 5), the actor ascends the same soft value (eq. 9), and
alpha moves so that the entropy keeps to a target (eq. 18). With continuous actions the expectation is one sample through which
the gradient passes; with discrete ones it is a sum (Christodoulou 2019, arXiv:1910.07207, eq. 10-12).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import optax

from ..config import check_bounds, configuration, refuse_unread
from ..distributions import Categorical, TanhGaussian
from ..math.reduce import polyak
from ..math.values import n_step_target, squared_value_loss, twin_minimum
from ..minibatches import clipped_adam, gradient_step
from ..networks import orthogonal_linear
from ..pathwise import ActionCritic, Features, ReplayActorCriticSettings, draw_batches, start_optimisers
from ..replay import Replay, Transitions, gradient_steps, insert, learn_once_started, start_replay
from ..spaces import action_size, uniform_choice
from ..types import EnvironmentSpec, Observation, PyTree, Rollout

LOG_STD_RANGE = -20.0, 2.0


@configuration
class SAC(ReplayActorCriticSettings):
    """Soft actor-critic with automatic temperature."""

    temperature: float | None = None
    """The price of entropy, alpha; by default it is learned, beginning at 1."""
    target_entropy: float | None = None
    """The entropy that the learned temperature aims at; by default minus the number of dimensions, or 0.98 ln n of n legal choices."""
    temperature_learning_rate: float = 3e-4
    """Step size of the Adam of the logarithm of the temperature."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, temperature="(0, inf)", temperature_learning_rate="(0, inf)")
        refuse_unread(self)

    @property
    def unread(self) -> dict[str, str]:
        """Settings that nothing reads as the others stand, and what would read them."""
        return {} if self.temperature is None else dict.fromkeys(("target_entropy", "temperature_learning_rate"), "temperature=None")


class SoftActor(eqx.Module):
    """One observation to a distribution over actions: a squashed normal, or a categorical."""

    features: Features
    head: eqx.nn.Linear
    is_discrete: bool = eqx.field(static=True)

    def __init__(self, config: SAC, spec: EnvironmentSpec, key: jax.Array):
        self.is_discrete = isinstance(spec.action_space, gymnasium.spaces.Discrete)
        if not self.is_discrete and not isinstance(spec.action_space, gymnasium.spaces.Box):
            raise ValueError(f"sac needs a Box or Discrete action space, and this is {spec.action_space}; ppo takes vectors of choices.")
        features_key, head_key = jax.random.split(key)
        self.features = Features(config, spec, features_key)
        self.head = orthogonal_linear(self.features.size, action_size(spec.action_space) * (1 if self.is_discrete else 2), 0.01, head_key)

    def __call__(self, obs: Observation, action_mask: Any) -> Categorical | TanhGaussian:
        output = self.head(self.features(obs))
        if self.is_discrete:
            return Categorical.from_logits(output, action_mask)
        size = len(output) // 2
        return TanhGaussian(output[:size], jnp.clip(output[size:], *LOG_STD_RANGE))


class Acting(NamedTuple):
    """What acting needs."""

    actor: SoftActor
    is_random: jax.Array  # [] bool: actions are uniform, since learning has not begun


class State(NamedTuple):
    """Everything that learning changes."""

    acting: Acting
    critics: tuple[ActionCritic, ActionCritic]
    target_critics: tuple[ActionCritic, ActionCritic]
    log_temperature: jax.Array  # []
    optimisers: tuple[optax.OptState, optax.OptState]  # of the actor, of the critics
    temperature_optimiser: optax.OptState
    replay: Replay


def init(config: SAC, spec: EnvironmentSpec, key: jax.Array) -> State:
    """Networks, copies of the critics, optimisers and an empty replay; ValueError where the actions do not suit, or rollouts do not fit."""
    gradient_steps(config, spec.num_envs)
    actor_key, *critic_keys = jax.random.split(key, 3)
    actor, critics = SoftActor(config, spec, actor_key), tuple(ActionCritic(config, spec, key) for key in critic_keys)
    return State(
        acting=Acting(actor, jnp.ones((), bool)),
        critics=critics,
        target_critics=critics,
        log_temperature=jnp.log(jnp.asarray(1.0 if config.temperature is None else config.temperature, float)),
        optimisers=start_optimisers(config, actor, critics),
        temperature_optimiser=optax.scale_by_adam().init(jnp.zeros(())),
        replay=start_replay(spec, capacity=config.replay_size, num_steps=config.num_steps),
    )


def act(config: SAC, acting: Acting, obs: Observation, action_mask: Any, carry: PyTree, key: Any) -> tuple[jax.Array, PyTree]:
    """One action for each of N streams, drawn with `key`, or the distribution's mode without one."""
    distribution = jax.vmap(acting.actor)(obs, action_mask)
    if key is None:
        return distribution.mode(), carry
    sample_key, random_key = jax.random.split(key)
    action = distribution.sample(sample_key)
    if isinstance(distribution, Categorical):
        uniform = uniform_choice(random_key, distribution.log_probs.shape, action_mask).astype(action.dtype)
    else:
        uniform = jax.random.uniform(random_key, action.shape, minval=-1.0)
    return jnp.where(acting.is_random, uniform, action), carry


def soft_value(actor: SoftActor, critics: Any, obs: Any, action_mask: Any, temperature: Any, key: Any) -> tuple[jax.Array, jax.Array]:
    """(V(s) = E_a[min Q(s, a) - alpha log pi(a|s)], the policy's entropy), both [B]: Haarnoja et al. 2018, eq. 3."""
    distribution = jax.vmap(actor)(obs, action_mask)
    if isinstance(distribution, Categorical):
        value = twin_minimum(jnp.stack([jax.vmap(critic)(obs) for critic in critics]))
        entropy = distribution.entropy()
        return jnp.sum(jnp.exp(distribution.log_probs) * value, axis=-1) + temperature * entropy, entropy
    action, log_prob = distribution.sample_and_log_prob(key)
    value = twin_minimum(jnp.stack([jax.vmap(critic)(obs, action) for critic in critics]))
    return value - temperature * log_prob, -log_prob


def critic_loss(critics: Any, target: jax.Array, batch: Transitions) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Haarnoja et al. 2018, eq. 5: the mean squared errors of both critics."""
    if critics[0].is_discrete:
        values = jnp.stack([jnp.take_along_axis(jax.vmap(critic)(batch.obs), batch.action[:, None], axis=1)[:, 0] for critic in critics])
    else:
        values = jnp.stack([jax.vmap(critic)(batch.obs, batch.action) for critic in critics])
    loss = jnp.mean(jnp.sum(squared_value_loss(values, jnp.broadcast_to(target, values.shape)), axis=0))
    return loss, {"critic_loss": loss, "action_value": jnp.mean(values)}


def wanted_entropy(config: SAC, actor: SoftActor, action_mask: Any) -> Any:
    if config.target_entropy is not None:
        return config.target_entropy
    if not actor.is_discrete:
        return -actor.head.out_features / 2
    return 0.98 * jnp.mean(jnp.log(actor.head.out_features if action_mask is None else jnp.sum(action_mask, axis=-1)))


def update(config: SAC, state: State, rollout: Rollout, frozen: None, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
    """Store a rollout [T, N], then take gradient steps of critics, actor and temperature on minibatches from the replay."""
    replay = insert(state.replay, rollout)
    minibatches = draw_batches(config, replay, key, rollout.reward.shape[1])
    optimiser = clipped_adam(config)

    def step(carry: PyTree, minibatch: tuple[Transitions, jax.Array]) -> tuple[PyTree, tuple[dict[str, jax.Array], None]]:
        actor, critics, targets, log_temperature, (actor_moments, critic_moments), moments = carry
        batch, key = minibatch
        next_key, own_key = jax.random.split(key)
        temperature = jnp.exp(log_temperature)
        next_value, _ = soft_value(actor, targets, batch.next_obs, batch.next_action_mask, temperature, next_key)
        target = n_step_target(batch.reward, next_value, batch.discount)
        (critics, critic_moments), of_critic = gradient_step(
            lambda critics: critic_loss(critics, target, batch), critics, critic_moments, optimiser, config.critic_learning_rate
        )

        def actor_loss(actor: SoftActor) -> tuple[jax.Array, dict[str, jax.Array]]:
            value, entropy = soft_value(actor, critics, batch.obs, batch.action_mask, temperature, own_key)
            return -jnp.mean(value), {"actor_loss": -jnp.mean(value), "entropy": jnp.mean(entropy)}

        (actor, actor_moments), of_actor = gradient_step(actor_loss, actor, actor_moments, optimiser, config.actor_learning_rate)
        if config.temperature is None:
            # The gradient of eq. 18 in log alpha, without the factor alpha, which would slow the way back from small ones.
            target_entropy = wanted_entropy(config, state.acting.actor, batch.action_mask)
            direction, moments = optax.scale_by_adam().update(of_actor["entropy"] - target_entropy, moments)
            log_temperature = log_temperature - config.temperature_learning_rate * direction
        targets = polyak(targets, critics, rate=config.target_rate)
        metrics = of_critic | {"critic_gradient_norm": of_critic.pop("gradient_norm")} | of_actor | {"temperature": temperature}
        return (actor, critics, targets, log_temperature, (actor_moments, critic_moments), moments), (metrics, None)

    temperature = state.log_temperature, state.optimisers, state.temperature_optimiser
    start = state.acting.actor, state.critics, state.target_critics, *temperature
    started, (actor, *others), (metrics, _) = learn_once_started(config, replay, step, start, minibatches)
    return State(Acting(actor, ~started), *others, replay), metrics | {"replay_size": replay.size}
