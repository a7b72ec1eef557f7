"""Deep Q-networks and everything that Rainbow adds to them, each an option, alone or together.

Mnih et al. 2015 (Nature 518): a network is fitted to r + gamma max_a Q'(s', a) on transitions drawn from a replay, Q' being a copy
that lags behind. Options: the action chosen by the online network (van Hasselt et al. 2016, eq. 4), value and advantage streams
(Wang et al. 2016, eq. 9), n-step returns, uncorrected as in Rainbow (Hessel et al. 2018, arXiv:1710.02298), noise in the weights in
place of random actions (Fortunato et al. 2018), return distributions on fixed atoms (Bellemare et al. 2017, algorithm 1) or by
quantiles (Dabney et al. 2018, eq. 10), prioritised replay (Schaul et al. 2016, algorithm 1). Left out: noise in hidden layers.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from ..action_values import ActionValues, atoms
from ..config import check_bounds, configuration, refuse_unread
from ..math.distributional import categorical_cross_entropy, categorical_projection, quantile_huber_loss
from ..math.reduce import polyak
from ..math.values import double_q_value, huber, max_value, n_step_target
from ..minibatches import clipped_adam, gradient_step, scheduled
from ..networks import network_name
from ..replay import Replay, Transitions, draw, gradient_steps, insert, learn_once_started, prioritise, start_replay, transitions
from ..spaces import uniform_choice
from ..types import EnvironmentSpec, Observation, PyTree, Rollout


@configuration
class DQN:
    """Deep Q-network, with the ingredients of Rainbow as options."""

    gamma: float = 0.99
    """Discount factor."""
    num_steps: int = 4
    """Steps of each environment between two visits to the replay."""
    update_to_data: float = 0.25
    """Gradient steps for each environment step."""
    minibatch_size: int = 32
    """Transitions in one gradient step."""
    replay_size: int = 1_000_000
    """Rows of the replay: transitions, and one more for each episode."""
    learning_starts: int = 1_000
    """Transitions in the replay before the first gradient step."""
    collect_beside_learning: bool = False
    """Collect a rollout while the one before it is learned from, by a policy that is one iteration older."""
    learning_rate: float = 1e-4
    """Step size of Adam."""
    learning_rate_schedule: Literal["constant", "linear"] = "constant"
    """Keep `learning_rate`, or let it fall linearly to 0 over the run."""
    max_grad_norm: float = 10.0
    """Gradients are scaled down to at most this norm."""
    target_interval: int = 2_500
    """Gradient steps between two updates of the target network."""
    target_rate: float = 1.0
    """Fraction of the way that the target network moves towards the online one in an update: 1 copies it, less is Polyak averaging."""
    exploration: Literal["epsilon", "noisy"] = "epsilon"
    """Random actions with a probability that falls during the run, or noise in the weights of the last layers."""
    exploration_fraction: float = 0.1
    """Part of the run over which the probability of a random action falls from 1 to `final_epsilon`."""
    final_epsilon: float = 0.05
    """Probability of a random action from then on."""
    double: bool = False
    """Let the online network choose the action that the target network values."""
    dueling: bool = False
    """Give the network one head for the value of the state and one for the advantages of actions."""
    n_step: int = 1
    """Rewards summed before the target network is asked."""
    distribution: Literal["none", "categorical", "quantile"] = "none"
    """What is learned of returns: their mean, their probabilities on fixed atoms (C51), or their quantiles."""
    num_atoms: int = 51
    """Atoms, or quantiles, of each action's distribution."""
    value_range: tuple[float, ...] = (-10.0, 10.0)
    """Lowest and highest return among the fixed atoms."""
    prioritised: bool = False
    """Draw transitions with a large error more often."""
    priority_exponent: float = 0.5
    """How much more often: 0 is uniform, 1 in proportion to the error."""
    importance_exponent: float = 0.4
    """How far importance weights correct for it at the start of the run; at its end they do so fully."""
    network: str = "mlp"
    """The torso: 'mlp', 'nature', 'impala' or 'minatar' for images, a class (Python), or 'module:Class'."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers of 'mlp'."""
    activation: Literal["tanh", "relu", "elu", "gelu", "silu"] = "relu"
    """Activation of the hidden layers of 'mlp'."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "network", network_name(self.network))
        check_bounds(self, gamma="[0, 1]", num_steps="[1, inf)", update_to_data="(0, inf)", minibatch_size="[1, inf)", n_step="[1, inf)")
        check_bounds(self, replay_size="[4, inf)", learning_starts="[1, inf)", learning_rate="(0, inf)", max_grad_norm="(0, inf]")
        check_bounds(self, target_interval="[1, inf)", target_rate="(0, 1]", exploration_fraction="(0, 1]", final_epsilon="[0, 1]")
        check_bounds(self, num_atoms="[2, inf)", priority_exponent="[0, 1]", importance_exponent="[0, 1]")
        if len(self.value_range) != 2 or not self.value_range[0] < self.value_range[1]:
            raise ValueError(f"{type(self).__name__}.value_range expects the lowest and the highest return, got {self.value_range}.")
        refuse_unread(self)

    @property
    def unread(self) -> dict[str, str]:
        """Settings that nothing reads as the others stand, and what would read them."""
        readers = {
            "exploration='epsilon'": (self.exploration == "epsilon", ("exploration_fraction", "final_epsilon")),
            "a distribution": (self.distribution != "none", ("num_atoms",)),
            "distribution='categorical'": (self.distribution == "categorical", ("value_range",)),
            "prioritised=True": (self.prioritised, ("priority_exponent", "importance_exponent")),
        }
        return {name: needs for needs, (reads, names) in readers.items() if not reads for name in names}


@configuration
class Rainbow(DQN):
    """Deep Q-network with all the ingredients of Rainbow together."""

    learning_rate: float = 6.25e-5
    """Step size of Adam."""
    exploration: Literal["epsilon", "noisy"] = "noisy"
    """Noise in the weights of the last layers, or random actions with a probability that falls during the run."""
    double: bool = True
    """Let the online network choose the action that the target network values."""
    dueling: bool = True
    """Give the network one head for the value of the state and one for the advantages of actions."""
    n_step: int = 3
    """Rewards summed before the target network is asked."""
    distribution: Literal["none", "categorical", "quantile"] = "categorical"
    """What is learned of returns: their probabilities on fixed atoms (C51), their quantiles, or their mean."""
    prioritised: bool = True
    """Draw transitions with a large error more often."""


class Acting(NamedTuple):
    """What acting needs."""

    network: ActionValues
    epsilon: jax.Array  # [] probability of a random action


class State(NamedTuple):
    """Everything that learning changes."""

    acting: Acting
    target: jax.Array  # the parameters of the network that lags behind, as one vector
    optimiser: optax.OptState
    num_updates: jax.Array  # [] int32
    replay: Replay


def init(config: DQN, spec: EnvironmentSpec, key: jax.Array) -> State:
    """Networks, optimiser and an empty replay; ValueError where actions are not a single choice, or rollouts do not fit."""
    gradient_steps(config, spec.num_envs)
    network = ActionValues(
        spec,
        key,
        network=config.network,
        hidden=config.hidden,
        activation=config.activation,
        num_atoms=1 if config.distribution == "none" else config.num_atoms,
        support=config.value_range if config.distribution == "categorical" else None,
        dueling=config.dueling,
        noisy=config.exploration == "noisy",
    )
    flat = ravel_pytree(network)[0]
    replay = start_replay(spec, capacity=config.replay_size, num_steps=config.num_steps, prioritised=config.prioritised)
    return State(
        Acting(network, epsilon_at(config, jnp.zeros(()))), flat, clipped_adam(config).init(flat), jnp.zeros((), jnp.int32), replay
    )


def epsilon_at(config: DQN, progress: jax.Array) -> jax.Array:
    """The probability of a random action after the fraction `progress` of the run."""
    if config.exploration == "noisy":
        return jnp.zeros(())
    return jnp.maximum(1.0 - (1.0 - config.final_epsilon) * progress / config.exploration_fraction, config.final_epsilon)


def act(config: DQN, acting: Acting, obs: Observation, action_mask: Any, carry: PyTree, key: Any) -> tuple[jax.Array, PyTree]:
    """One action for each of N streams: the best, or now and then a random one; always the best without a `key`."""
    noise_key, random_key, choice_key = (None,) * 3 if key is None else jax.random.split(key, 3)
    noise = None if key is None else acting.network.noise(noise_key)
    output = jax.vmap(acting.network, (0, None))(obs, noise)
    values = acting.network.expected(output)
    if action_mask is not None:
        values = jnp.where(action_mask, values, -jnp.inf)
    best = jnp.argmax(values, axis=-1).astype(jnp.int32)
    if key is None or config.exploration == "noisy":
        return best, carry
    explores = jax.random.uniform(random_key, best.shape) < acting.epsilon
    return jnp.where(explores, uniform_choice(choice_key, values.shape, action_mask), best), carry


def target_of(config: DQN, online: ActionValues, target: ActionValues, batch: Transitions, noise: Any) -> jax.Array:
    """What Q(s, a) is fitted to, [B]; of a distribution the probabilities of its atoms, or samples, [B, K].

    `noise` is what is drawn for the target network, and for the online one.
    """
    output = jax.vmap(target, (0, None))(batch.next_obs, noise[0])
    values, mask = target.expected(output), batch.next_action_mask
    chooser = online.expected(jax.vmap(online, (0, None))(batch.next_obs, noise[1])) if config.double else values
    if config.distribution == "none":
        value = double_q_value(chooser, values, mask) if config.double else max_value(values, mask)
        return n_step_target(batch.reward, value, batch.discount)
    chosen = jnp.argmax(chooser if mask is None else jnp.where(mask, chooser, -jnp.inf), axis=-1)
    following = jnp.take_along_axis(output, chosen[:, None, None], axis=1)[:, 0]  # [B, K]
    returns = atoms(config.value_range, config.num_atoms) if config.distribution == "categorical" else following
    returns = n_step_target(*jnp.broadcast_arrays(batch.reward[:, None], returns, batch.discount[:, None]))
    if config.distribution == "quantile":
        return returns
    return categorical_projection(jax.nn.softmax(following), returns, atoms(config.value_range, config.num_atoms))


def errors(config: DQN, network: ActionValues, batch: Transitions, target: jax.Array, noise: Any) -> tuple[jax.Array, jax.Array]:
    """(the loss of each transition [B], how far off it was, which is its priority [B])."""
    output = jax.vmap(network, (0, None))(batch.obs, noise)
    taken = jnp.take_along_axis(output, batch.action[:, None, None], axis=1)[:, 0]  # [B, K]
    if config.distribution == "none":
        error = taken[:, 0] - target
        return huber(error, delta=1.0), jnp.abs(error)
    if config.distribution == "categorical":
        loss = categorical_cross_entropy(jax.nn.log_softmax(taken), target)
        return loss, loss
    loss = quantile_huber_loss(taken, target)
    return loss, jnp.abs(jnp.mean(taken, axis=-1) - jnp.mean(target, axis=-1))


def update(config: DQN, state: State, rollout: Rollout, frozen: None, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
    """Store a rollout [T, N], then take gradient steps on minibatches from the replay, all drawn at once."""
    replay = insert(state.replay, rollout)
    draw_key, noise_key = jax.random.split(key)
    shape = gradient_steps(config, rollout.reward.shape[1]), config.minibatch_size
    index, weight = draw(config, replay, draw_key, shape, rollout.progress)
    batches = transitions(replay, index, n_step=config.n_step, discount=config.gamma)
    learning_rate = scheduled(config.learning_rate, config.learning_rate_schedule, rollout.progress)
    flat, unravel = ravel_pytree(state.acting.network)

    def step(carry: PyTree, minibatch: tuple[Transitions, jax.Array, Any]) -> tuple[PyTree, tuple[Any, jax.Array]]:
        flat, target, moments, count = carry
        batch, weight, noise = minibatch
        wanted = target_of(config, unravel(flat), unravel(target), batch, noise[1:])

        def loss(flat: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
            each, error = errors(config, unravel(flat), batch, wanted, noise[0])
            return jnp.mean(weight * each), {"error": error}

        (flat, moments), metrics = gradient_step(loss, flat, moments, clipped_adam(config), learning_rate)
        count, error = count + 1, metrics.pop("error")
        moved = polyak(target, flat, rate=config.target_rate)
        target = jnp.where(count % config.target_interval == 0, moved, target)
        return (flat, target, moments, count), (metrics | {"td_error": jnp.mean(error)}, error)

    start = flat, state.target, state.optimiser, state.num_updates
    # Drawn for all steps at once, since each draw inside the loop would be a loop of its own.
    noise = tuple(jax.vmap(state.acting.network.noise)(keys) for keys in jax.random.split(noise_key, (3, shape[0])))
    minibatches = batches, weight, noise
    started, (flat, target, moments, count), (metrics, error) = learn_once_started(config, replay, step, start, minibatches)
    if config.prioritised:
        replay = prioritise(replay, index, (error + 1e-6) ** config.priority_exponent, where=started)
    acting = Acting(unravel(flat), epsilon_at(config, rollout.progress))
    metrics |= {"epsilon": acting.epsilon, "replay_size": replay.size, "learning_rate": jnp.asarray(learning_rate)}
    return State(acting, target, moments, count, replay), metrics
