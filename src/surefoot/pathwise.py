"""What the methods with an actor, a critic and a replay share: settings, networks, minibatches; and acting with a deterministic actor."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax

from .config import check_bounds, configuration
from .minibatches import clipped_adam
from .networks import MLP, build_torso, network_name, orthogonal_linear
from .replay import Replay, Transitions, draw_uniform, gradient_steps, transitions
from .spaces import action_size, choices, encoded_size
from .types import EnvironmentSpec, Observation, PyTree


@configuration
class ReplayActorCriticSettings:
    """The settings that every method with an actor, a critic and a replay has."""

    gamma: float = 0.99
    """Discount factor."""
    num_steps: int = 1
    """Steps of each environment between two visits to the replay."""
    update_to_data: float = 1.0
    """Gradient steps for each environment step."""
    minibatch_size: int = 256
    """Transitions in one gradient step."""
    replay_size: int = 1_000_000
    """Rows of the replay: transitions, and one more for each episode."""
    learning_starts: int = 1_000
    """Transitions in the replay before the first gradient step; until then actions are uniformly random."""
    collect_beside_learning: bool = False
    """Collect a rollout while the one before it is learned from, by a policy that is one iteration older."""
    actor_learning_rate: float = 3e-4
    """Step size of the actor's Adam."""
    critic_learning_rate: float = 3e-4
    """Step size of the critic's Adam."""
    max_grad_norm: float = float("inf")
    """The gradients of actor and critic are each scaled down to at most this norm; never by default."""
    target_rate: float = 0.005
    """Fraction of the way that target networks move towards the online ones in each gradient step."""
    network: str = "mlp"
    """The torso of actor and critic: 'mlp', 'nature', 'impala' or 'minatar' for images, a class (Python), or 'module:Class'."""
    hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers."""
    activation: Literal["tanh", "relu", "elu", "gelu", "silu"] = "relu"
    """Activation of the hidden layers."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "network", network_name(self.network))
        check_bounds(self, gamma="[0, 1]", num_steps="[1, inf)", update_to_data="(0, inf)", minibatch_size="[1, inf)")
        check_bounds(self, replay_size="[4, inf)", learning_starts="[1, inf)", target_rate="(0, 1]", max_grad_norm="(0, inf]")
        check_bounds(self, actor_learning_rate="(0, inf)", critic_learning_rate="(0, inf)")


def shape_of(config: Any) -> dict[str, Any]:
    """Of the networks."""
    return {"hidden": config.hidden, "activation": config.activation}


class Features(eqx.Module):
    """One observation, and an action where there is one, through the hidden layers."""

    torso: Any  # a user's network; None for 'mlp', which takes the observation as it is
    layers: MLP
    size: int = eqx.field(static=True)

    def __init__(self, config: Any, spec: EnvironmentSpec, key: jax.Array, *, with_action: bool = False):
        torso_key, layers_key = jax.random.split(key)
        seen: dict[str, gymnasium.Space[Any]] = {"obs": spec.observation_space}
        self.torso = None
        if config.network != "mlp":
            self.torso, width = build_torso(config.network, spec.observation_space, torso_key, **shape_of(config))
            seen["obs"] = gymnasium.spaces.Box(-np.inf, np.inf, (width,))
        if with_action:
            among = choices(spec.action_space)
            width = action_size(spec.action_space)
            seen["action"] = gymnasium.spaces.Box(-1.0, 1.0, (width,)) if among is None else gymnasium.spaces.MultiDiscrete(among)
        self.layers = MLP(gymnasium.spaces.Dict(seen), layers_key, **shape_of(config))
        self.size = config.hidden[-1] if config.hidden else encoded_size(self.layers.plan)

    def __call__(self, obs: Observation, action: jax.Array | None = None) -> jax.Array:
        seen = {"obs": obs if self.torso is None else self.torso(obs)}
        return self.layers(seen if action is None else seen | {"action": action})


class ActionCritic(eqx.Module):
    """Q(s, a) of one observation and one action: numbers in [-1, 1]^A, or choices. Of a Discrete action space Q(s, .) of all actions."""

    features: Features
    head: eqx.nn.Linear
    is_discrete: bool = eqx.field(static=True)

    def __init__(self, config: Any, spec: EnvironmentSpec, key: jax.Array):
        features_key, head_key = jax.random.split(key)
        self.is_discrete = isinstance(spec.action_space, gymnasium.spaces.Discrete)
        self.features = Features(config, spec, features_key, with_action=not self.is_discrete)
        self.head = orthogonal_linear(self.features.size, action_size(spec.action_space) if self.is_discrete else 1, 1.0, head_key)

    def __call__(self, obs: Observation, action: jax.Array | None = None) -> jax.Array:
        values = self.head(self.features(obs, action))
        return values if self.is_discrete else values[0]


class DeterministicActor(eqx.Module):
    """One observation to one action in [-1, 1]^A."""

    features: Features
    head: eqx.nn.Linear

    def __init__(self, config: ReplayActorCriticSettings, spec: EnvironmentSpec, key: jax.Array):
        if not isinstance(spec.action_space, gymnasium.spaces.Box):
            raise ValueError(
                f"The gradient of {type(config).__name__} goes through the action, which needs a Box action space, and this is "
                f"{spec.action_space}; take sac or dqn for a Discrete one, ppo for vectors of choices."
            )
        features_key, head_key = jax.random.split(key)
        self.features = Features(config, spec, features_key)
        self.head = orthogonal_linear(self.features.size, action_size(spec.action_space), 0.01, head_key)

    def __call__(self, obs: Observation) -> jax.Array:
        return jnp.tanh(self.head(self.features(obs)))


class DeterministicActing(NamedTuple):
    """What acting with a deterministic actor needs."""

    actor: DeterministicActor
    is_random: jax.Array  # [] bool: actions are uniform, since learning has not begun


def act_with_noise(config: Any, acting: DeterministicActing, obs: Observation, action_mask: Any, carry: Any, key: Any) -> tuple[Any, Any]:
    """The actor's action for each of N streams, with normal noise of `config.exploration_noise`; without a `key`, without noise."""
    action = jax.vmap(acting.actor)(obs)
    if key is None:
        return action, carry
    noise_key, random_key = jax.random.split(key)
    noisy = jnp.clip(action + config.exploration_noise * jax.random.normal(noise_key, action.shape), -1.0, 1.0)
    return jnp.where(acting.is_random, jax.random.uniform(random_key, action.shape, minval=-1.0), noisy), carry


def start_optimisers(config: Any, actor: PyTree, critic: PyTree) -> tuple[optax.OptState, optax.OptState]:
    """Adam's moments for the parameters of the actor and of the critic."""
    return clipped_adam(config).init(actor), clipped_adam(config).init(critic)


def draw_batches(config: ReplayActorCriticSettings, replay: Replay, key: jax.Array, num_envs: int) -> tuple[Transitions, jax.Array]:
    """(one minibatch for each gradient step of an iteration [K, B, ...], a key for each)."""
    draw_key, step_key = jax.random.split(key)
    steps = gradient_steps(config, num_envs)
    index = draw_uniform(replay, draw_key, (steps, config.minibatch_size))
    return transitions(replay, index, n_step=1, discount=config.gamma), jax.random.split(step_key, steps)
