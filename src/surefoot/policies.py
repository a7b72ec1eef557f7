"""Actors, critics, and the stochastic policy that the policy-gradient methods share.

An actor turns an observation into features, and these into a distribution over actions. With a memory (`memory="gru"`) the
features are the state of a recurrent cell, which starts from zeros in every episode. A critic has a network of its own, which
reads what the actor remembers but sends no gradient there; with `shared_trunk` it is a second head on the actor's features.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp

from .config import check_bounds, configuration
from .distributions import Categorical, DiagonalGaussian, Distribution, MultiCategorical
from .networks import build_torso, network_name, orthogonal_linear, over_rows
from .normalise import Normaliser, normalise, observation_normaliser
from .pathwise import ActionCritic
from .spaces import action_size, choices
from .types import Array, EnvironmentSpec, Observation, PyTree, Rollout


@configuration
class ActorCriticSettings:
    """The settings that every method with an actor and a critic has."""

    normalise_observation: bool = True
    """Subtract the running mean of observations and divide by their running standard deviation."""
    normalise_reward: bool = True
    """Divide rewards by the running standard deviation of the discounted return."""
    state_discount: bool = False
    """Weigh step t of an episode by gamma^t, as the gradient of the discounted return has it; leaving it out is customary."""
    network: str = "mlp"
    """The torso of actor and critic: 'mlp', 'nature', 'impala' or 'minatar' for images, a class (Python), or 'module:Class'."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers of 'mlp'."""
    activation: Literal["tanh", "relu", "elu", "gelu", "silu"] = "tanh"
    """Activation of the hidden layers of 'mlp'."""
    shared_trunk: bool = False
    """Make the critic a second head on the actor's features, and not a network of its own."""
    memory: Literal["none", "gru"] = "none"
    """What the policy remembers of its episode: nothing, or the state of a gated recurrent unit after the torso."""
    memory_size: int = 64
    """Width of the memory's state."""
    initial_log_std: float = 0.0
    """Logarithm of the standard deviation with which continuous actions, scaled to [-1, 1], are drawn at first."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "network", network_name(self.network))
        check_bounds(self, memory_size="[1, inf)")


class Actor(eqx.Module):
    """One observation to a distribution over actions in the policy's units."""

    torso: Any
    memory: eqx.nn.GRUCell | None
    head: eqx.nn.Linear
    log_std: jax.Array | None  # [A] for continuous actions, independent of the state
    choices: tuple[int, ...] | None = eqx.field(static=True)  # among how many actions each part of a discrete one is chosen
    is_vector: bool = eqx.field(static=True)

    def __init__(
        self,
        network: str,
        observation_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        key: jax.Array,
        *,
        initial_log_std: float = 0.0,
        memory_size: int = 0,
        **shape: Any,
    ):
        torso_key, head_key, memory_key = jax.random.split(key, 3)
        self.torso, features = build_torso(network, observation_space, torso_key, **shape)
        self.memory = eqx.nn.GRUCell(features, memory_size, key=memory_key) if memory_size else None
        # A small last layer starts the policy near uniform, or near zero mean (Andrychowicz et al. 2021, section 3.2).
        self.head = orthogonal_linear(memory_size or features, action_size(action_space), 0.01, head_key)
        self.choices, self.is_vector = choices(action_space), action_space.shape != ()
        self.log_std = jnp.full(action_size(action_space), float(initial_log_std)) if self.choices is None else None

    def choose(self, features: jax.Array, action_mask: jax.Array | None) -> Distribution:
        """The distribution over actions that features lead to."""
        output = self.head(features)
        if self.log_std is not None:
            return DiagonalGaussian(output, jnp.broadcast_to(self.log_std, output.shape))
        if self.is_vector:
            return MultiCategorical.from_logits(output, self.choices, action_mask)
        return Categorical.from_logits(output, action_mask)


class Critic(eqx.Module):
    """One observation, and the actor's features where it reads them, to one value, or to one for each action."""

    torso: Any  # None where the actor's is shared
    head: eqx.nn.Linear
    reads_memory: bool = eqx.field(static=True)
    of_actions: bool = eqx.field(static=True)

    def __init__(
        self,
        network: str,
        observation_space: gymnasium.Space[Any],
        key: jax.Array,
        *,
        memory_size: int = 0,
        num_actions: int | None = None,
        **shape: Any,
    ):
        torso_key, head_key = jax.random.split(key)
        self.torso, features = build_torso(network, observation_space, torso_key, **shape)
        self.head = orthogonal_linear(features + memory_size, num_actions or 1, 1.0, head_key)
        self.reads_memory, self.of_actions = memory_size > 0, num_actions is not None

    def __call__(self, obs: Observation, features: jax.Array) -> jax.Array:
        if self.torso is not None:
            own = self.torso(obs)
            features = jnp.concatenate([own, jax.lax.stop_gradient(features)]) if self.reads_memory else own
        values = self.head(features)
        return values if self.of_actions else values[0]


class StochasticPolicy(NamedTuple):
    """All that acting needs: the actor, and the normaliser of what it sees."""

    actor: Actor
    normaliser: Normaliser


def actor_and_critic(config: ActorCriticSettings, spec: EnvironmentSpec, key: jax.Array) -> tuple[StochasticPolicy, Critic]:
    """Networks and normaliser before the first step, as `config` has them."""
    actor_key, critic_key = jax.random.split(key)
    shape = {"hidden": config.hidden, "activation": config.activation, "memory_size": config.memory_size if config.memory == "gru" else 0}
    spaces = spec.observation_space, spec.action_space
    actor = Actor(config.network, *spaces, actor_key, initial_log_std=config.initial_log_std, **shape)
    critic = Critic(config.network, spec.observation_space, critic_key, **shape)
    if config.shared_trunk:
        head = orthogonal_linear(actor.head.in_features, 1, 1.0, critic_key)
        critic = eqx.tree_at(lambda critic: (critic.torso, critic.head), critic, (None, head))
    return StochasticPolicy(actor, observation_normaliser(spec.observation_space) if config.normalise_observation else None), critic


def critic_of_actions(config: ActorCriticSettings, spec: EnvironmentSpec, key: jax.Array) -> Critic | ActionCritic:
    """A critic with a value for each single choice, or one that is given the action; ValueError where that one would need a memory."""
    if isinstance(spec.action_space, gymnasium.spaces.Discrete):
        shape = {"hidden": config.hidden, "activation": config.activation, "num_actions": int(spec.action_space.n)}
        memory_size = config.memory_size if config.memory == "gru" else 0
        return Critic(config.network, spec.observation_space, key, memory_size=memory_size, **shape)
    if config.memory != "none":
        raise ValueError(
            f"A critic that is given the action, as {spec.action_space} asks for, reads no memory; leave memory at 'none', or use "
            "critic='value'."
        )
    return ActionCritic(config, spec, key)


class Inputs(NamedTuple):
    """What actor and critic are given of each row, [T, N, ...]: of a batch, or of sequences from it."""

    obs: Observation  # normalised
    action_mask: Array | None
    time: Array  # steps since the reset: the memory is empty where it is 0
    carry: PyTree  # what the memory held before each row, of which only the first is read; None without a memory


def inputs_of(policy: StochasticPolicy, rollout: Rollout) -> Inputs:
    """The inputs of a rollout, the memory that of its first row."""
    obs = normalise(policy.normaliser, rollout.obs)
    return Inputs(obs, rollout.action_mask, rollout.time, jax.tree.map(lambda x: x[None], rollout.carry))


def features_after(actor: Actor, obs: Observation, carry: PyTree) -> jax.Array:
    """The actor's features [N, F] of observations [N, ...] that follow what it remembers, which they then are."""
    features = jax.vmap(actor.torso)(obs)
    return features if actor.memory is None else jax.vmap(actor.memory)(features, carry)


def features_of(actor: Actor, inputs: Inputs) -> jax.Array:
    """The actor's features [T, N, F], step by step where it has a memory."""
    if actor.memory is None:
        return over_rows(actor.torso, inputs.obs)

    def step(carry: jax.Array, row: tuple[Observation, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return (features_after(actor, row[0], begin_episodes(carry, row[1])),) * 2

    return jax.lax.scan(step, inputs.carry[0], (inputs.obs, inputs.time))[1]


def distributions_of(actor: Actor, inputs: Inputs) -> Distribution:
    """Over the actions at each row [T, N]."""
    return over_rows(actor.choose, features_of(actor, inputs), inputs.action_mask)


def distributions_and_values(actor: Actor, critic: Critic, inputs: Inputs) -> tuple[Distribution, jax.Array]:
    """The distribution over actions and V(s) at each row [T, N]."""
    features = features_of(actor, inputs)
    return over_rows(actor.choose, features, inputs.action_mask), over_rows(critic, inputs.obs, features)


def act(config: Any, acting: StochasticPolicy, obs: Observation, action_mask: Any, carry: PyTree, key: Any) -> tuple[jax.Array, PyTree]:
    """One action for each of N streams, drawn with `key`, or the distribution's mode without one; and what is remembered.

    A `carry` of None is an empty memory.
    """
    actor, obs = acting.actor, normalise(acting.normaliser, obs)
    if actor.memory is not None and carry is None:
        carry = jnp.zeros((jax.tree.leaves(obs)[0].shape[0], actor.memory.hidden_size))
    features = features_after(actor, obs, carry)
    distribution = jax.vmap(actor.choose)(features, action_mask)
    return (distribution.mode() if key is None else distribution.sample(key)), (carry if actor.memory is None else features)


def begin_episodes(carry: PyTree, time: Array) -> PyTree:
    """Memory [N, ...] to act from: zeros where an episode begins, which is where time [N] is 0."""
    return jax.tree.map(lambda x: where_rows(time == 0, jnp.zeros_like(x), x), carry)


def where_rows(mask: Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """`new` [N, ...] in the rows where `mask` [N] is true, `old` elsewhere; PRNG keys too."""
    return jnp.where(mask.reshape(-1, *[1] * (new.ndim - 1)), new, old)
