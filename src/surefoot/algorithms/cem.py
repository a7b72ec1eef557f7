"""The cross-entropy method: draw policies from a normal distribution, play each of them, refit the distribution to the best.

Szita & Lorincz 2006, "Learning Tetris Using the Noisy Cross-Entropy Method", with their decreasing extra noise. Every
candidate is a deterministic policy and plays `episodes` whole episodes; once all have, the elites give the next mean and spread.
The mean is what is saved. A stream plays one candidate until its episode ends, however many batches that takes, and each batch
ends by saying who is next; an episode that outlives its generation counts for nothing. There is no critic and no gradient.
Left out: a bootstrap at a time limit, memories, and a step audit by ratios, which candidates of probability 0 or 1 do not have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from ..config import check_bounds, configuration
from ..math.divergences import gaussian_kl
from ..math.evolution import decaying_noise, refit_gaussian, select_elites
from ..math.returns import time_discount
from ..networks import network_name
from ..normalise import Normaliser, normalise, observation_normaliser, update_normaliser
from ..policies import Actor
from ..types import EnvironmentSpec, Observation, PyTree, Rollout

__all__ = ["CEM", "State", "act", "init", "update"]


@configuration
class CEM:
    """The cross-entropy method over the parameters of deterministic policies."""

    gamma: float = 1.0
    """Discount factor of the returns by which candidates are compared."""
    population: int = 40
    """Candidates in a generation; at least as many as environments."""
    elite_fraction: float = 0.2
    """Share of the candidates to which the distribution is refitted."""
    episodes: int = 1
    """Episodes that each candidate plays."""
    initial_std: float = 0.5
    """Standard deviation of every parameter in the first generation, around the network's first parameters."""
    extra_noise: float = 0.1
    """Variance that the first refit adds to every parameter's own; it falls linearly from there."""
    noise_generations: int = 10
    """Generations until nothing is added any more."""
    num_steps: int = 32
    """Steps of each environment in one batch, at whose end streams are given their next candidates."""
    normalise_observation: bool = True
    """Subtract the running mean of observations and divide by their running standard deviation, both as the last generation left them."""
    network: str = "mlp"
    """The torso of the policy: 'mlp', 'nature', 'impala' or 'minatar' for images, a class (Python), or 'module:Class'."""
    hidden: tuple[int, ...] = ()
    """Widths of the hidden layers of 'mlp'; none by default, a linear policy."""
    activation: Literal["tanh", "relu", "elu", "gelu", "silu"] = "tanh"
    """Activation of the hidden layers of 'mlp'."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "network", network_name(self.network))
        check_bounds(self, gamma="[0, 1]", population="[2, inf)", elite_fraction="(0, 1]", episodes="[1, inf)", num_steps="[1, inf)")
        check_bounds(self, initial_std="(0, inf)", extra_noise="[0, inf)", noise_generations="[1, inf)")


class Acting(NamedTuple):
    """The mean policy, and the candidates that are being tried."""

    actor: Actor  # the mean
    normaliser: Normaliser
    candidates: jax.Array  # [P, D] parameters
    queue: jax.Array  # [P] int32, numbers of candidates: where an episode begins, stream n plays the n-th


class Trial(NamedTuple):
    """How far the generation has come."""

    begun: jax.Array  # [P] int32 episodes that count and have begun
    finished: jax.Array  # [P] int32 of these, those that are over
    total_return: jax.Array  # [P] their discounted returns, added up
    playing: jax.Array  # [N] int32 candidate whose episode each stream plays; -1 where the episode does not count
    running_return: jax.Array  # [N] of that episode so far


class State(NamedTuple):
    """Everything that learning changes."""

    acting: Acting
    std: jax.Array  # [D] of the parameters
    generation: jax.Array  # [] int32, refits so far
    normaliser: Normaliser  # with everything seen; candidates of one generation act by the same statistics
    trial: Trial


def vector_of(actor: Actor) -> tuple[jax.Array, Callable[[jax.Array], Actor]]:
    """What is searched of an actor as one vector [D], and the way back; the spread of its actions is not."""
    flat, unravel = ravel_pytree((actor.torso, actor.head))
    return flat, lambda flat: eqx.tree_at(lambda actor: (actor.torso, actor.head), actor, unravel(flat))


def first_trial(population: int, num_envs: int) -> Trial:
    """Before a generation's first episode."""
    counts = jnp.zeros(population, jnp.int32)
    return Trial(counts, counts, jnp.zeros(population), jnp.full(num_envs, -1, jnp.int32), jnp.zeros(num_envs))


def init(config: CEM, spec: EnvironmentSpec, key: jax.Array) -> State:
    """The first generation; ValueError for more environments than candidates."""
    if config.population < spec.num_envs:
        raise ValueError(
            f"population={config.population} is less than the {spec.num_envs} environments, which play different candidates at a time; "
            "choose a larger population, or fewer environments."
        )
    actor_key, draw_key = jax.random.split(key)
    shape = {"hidden": config.hidden, "activation": config.activation}
    actor = Actor(config.network, spec.observation_space, spec.action_space, actor_key, **shape)
    normaliser = observation_normaliser(spec.observation_space) if config.normalise_observation else None
    mean, _ = vector_of(actor)
    candidates = mean + config.initial_std * jax.random.normal(draw_key, (config.population, mean.size))
    acting = Acting(actor, normaliser, candidates, jnp.arange(config.population, dtype=jnp.int32))
    trial = first_trial(config.population, spec.num_envs)
    return State(acting, jnp.full(mean.size, config.initial_std, float), jnp.zeros((), jnp.int32), normaliser, trial)


def act(config: CEM, acting: Acting, obs: Observation, action_mask: Any, carry: PyTree, key: Any) -> tuple[jax.Array, PyTree]:
    """The most likely action of each stream's candidate, whose number and 1 it remembers; without a key, of the mean."""
    obs = normalise(acting.normaliser, obs)

    def mode(actor: Actor, obs: Observation, action_mask: Any) -> jax.Array:
        return actor.choose(actor.torso(obs), action_mask).mode()

    if key is None:
        return jax.vmap(mode, (None, 0, 0))(acting.actor, obs, action_mask), carry
    num_streams, (_, actor_of) = jax.tree.leaves(obs)[0].shape[0], vector_of(acting.actor)
    carry = jnp.zeros(num_streams, jnp.int32) if carry is None else carry
    number = jnp.where(carry > 0, carry - 1, next_candidates(acting, num_streams))
    return jax.vmap(lambda flat, *row: mode(actor_of(flat), *row))(acting.candidates[number], obs, action_mask), number + 1


def next_candidates(acting: Acting, num_streams: int) -> jax.Array:
    """[N] what each stream plays where it begins an episode."""
    return acting.queue[jnp.arange(num_streams) % len(acting.queue)]


def follow(config: CEM, acting: Acting, trial: Trial, rollout: Rollout) -> Trial:
    """Count the batch's episodes in."""
    number = next_candidates(acting, len(trial.playing))

    def add(to: jax.Array, where: jax.Array, candidate: jax.Array, amount: Any) -> jax.Array:
        return to.at[jnp.where(where, candidate, len(to))].add(amount, mode="drop")

    def step(trial: Trial, row: tuple[jax.Array, ...]) -> tuple[Trial, None]:
        begins, reward, ended = row
        begun, finished, total_return, playing, running_return = trial
        # An episode without an end was forgotten by an environment that could not resume it: its candidate plays again.
        begun = add(begun, begins & (playing >= 0), playing, -1)
        counts = begins & (begun[number] < config.episodes)
        begun = add(begun, counts, number, 1)
        playing = jnp.where(begins, jnp.where(counts, number, -1), playing)
        running_return = jnp.where(begins, 0, running_return) + reward
        over = ended & (playing >= 0)
        finished, total_return = add(finished, over, playing, 1), add(total_return, over, playing, running_return)
        return Trial(begun, finished, total_return, jnp.where(ended, -1, playing), running_return), None

    reward = jnp.where(rollout.valid, time_discount(rollout.time, discount=config.gamma) * rollout.reward, 0)
    rows = rollout.valid & (rollout.time == 0), reward, rollout.valid & (rollout.terminated | rollout.truncated)
    return jax.lax.scan(step, trial, rows)[0]


def refit(config: CEM, state: State, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
    """The next generation, from one that has been played to the end."""
    fitness = state.trial.total_return / state.trial.finished
    num_elites = max(1, round(config.elite_fraction * config.population))
    elites = select_elites(state.acting.candidates, fitness, num_elites=num_elites)
    noise = decaying_noise(state.generation, start=config.extra_noise, generations=config.noise_generations)
    mean, std = refit_gaussian(elites, extra_variance=noise)
    old_mean, actor_of = vector_of(state.acting.actor)
    candidates = mean + std * jax.random.normal(key, state.acting.candidates.shape)
    acting = Acting(actor_of(mean), state.normaliser, candidates, state.acting.queue)
    trial, best = first_trial(config.population, len(state.trial.playing)), jnp.sort(fitness, descending=True)[:num_elites]
    return State(acting, std, state.generation + 1, state.normaliser, trial), {
        "search_kl": jnp.sum(gaussian_kl(old_mean, jnp.log(state.std), mean, jnp.log(std))),
        "population_return": jnp.mean(fitness),
        "elite_return": jnp.mean(best),
    }


def update(config: CEM, state: State, rollout: Rollout, frozen: None, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
    """One iteration on a batch [T, N]: its episodes, the next generation if this one is complete, and who is next."""
    trial = follow(config, state.acting, state.trial, rollout)
    state = state._replace(trial=trial, normaliser=update_normaliser(state.normaliser, rollout.obs, rollout.valid))

    nothing = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), jax.eval_shape(lambda: refit(config, state, key)[1]))
    complete = jnp.all(trial.finished >= config.episodes)
    state, metrics = jax.lax.cond(complete, lambda: refit(config, state, key), lambda: (state, nothing))
    queue = jnp.argsort(state.trial.begun, stable=True).astype(jnp.int32)
    state = state._replace(acting=state.acting._replace(queue=queue))
    return state, metrics | {"generation": state.generation, "parameter_std": jnp.mean(state.std)}
