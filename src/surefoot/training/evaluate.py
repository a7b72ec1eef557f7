"""Evaluation: whole episodes of a fixed policy, on seeds that training does not use."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..algorithms import of
from ..collect import HostCollector, scan_rollout, start_stream
from ..envs import is_device, is_vector, make
from ..types import HostEnvironment, PyTree, counted
from .episodes import Running, follow
from .policy import Policy
from .seeding import key_for, seed_for
from .session import whole_number

CHUNK = 100  # steps between two looks at whether to stop
MAX_STEPS = 100_000  # of one episode: an environment without end must not hang an evaluation


def evaluate(
    policy: Policy, env: Any, *, episodes: int = 100, deterministic: bool = True, seed: int = 0, poll: Callable[[], None] = lambda: None
) -> np.ndarray[Any, Any]:
    """Undiscounted returns of `episodes` whole episodes, as results count them, [episodes] float64, the same for the same seed.

    Every stream plays a fixed number of episodes, so that short ones are not counted more often than long ones.
    `poll` is called between chunks and may raise.
    """
    episodes = whole_number("episodes", episodes, minimum=1)
    environment, _ = make(env, env.num_envs if is_vector(env) else host_streams(episodes))
    if is_device(environment):
        return _evaluate_device(policy, environment, episodes, deterministic, seed, poll)
    try:
        return _evaluate_host(policy, environment, episodes, deterministic, seed, poll)
    finally:
        if not is_vector(env):
            environment.close()


def host_streams(episodes: int) -> int:
    """How many host environments play `episodes` episodes in equal shares: they cost time and memory to make."""
    return next(n for n in range(16, 0, -1) if episodes % n == 0)


def act_of(policy: Policy, deterministic: bool) -> Callable[..., Any]:
    """How the policy acts, as collectors want it."""

    def act(acting: PyTree, obs: Any, action_mask: Any, carry: PyTree, key: jax.Array) -> Any:
        return of(policy.config).act(policy.config, acting, obs, action_mask, carry, None if deterministic else key)

    return act


def _evaluate_device(
    policy: Policy, environment: Any, episodes: int, deterministic: bool, seed: int, poll: Callable[[], None]
) -> np.ndarray[Any, Any]:
    act = act_of(policy, deterministic)

    @jax.jit
    def chunk(acting: PyTree, stream: PyTree, running: Running, key: jax.Array) -> Any:
        stream, rollout = scan_rollout(environment, partial(act, acting), stream, CHUNK, jnp.float32(1.0), key)
        running, ended = follow(running, rollout, discount=1.0)
        first = jnp.argmax(ended.here, axis=0)
        return stream, running, jnp.any(ended.here, axis=0), jnp.take_along_axis(ended.episode_return, first[None], axis=0)[0]

    action_key = key_for(seed, "evaluation actions")
    start = jax.jit(lambda key: start_stream(environment, episodes, key, partial(act, policy.acting)))
    stream = start(key_for(seed, "evaluation"))
    running, returns = Running.start(episodes), np.full(episodes, np.nan)
    for index in range(MAX_STEPS // CHUNK):
        stream, running, over, episode_return = chunk(policy.acting, stream, running, jax.random.fold_in(action_key, index))
        returns = np.where(np.isnan(returns) & np.asarray(over), np.asarray(episode_return, np.float64), returns)
        if not np.isnan(returns).any():
            return returns
        poll()
    raise _no_end()


def _evaluate_host(
    policy: Policy, environment: HostEnvironment, episodes: int, deterministic: bool, seed: int, poll: Callable[[], None]
) -> np.ndarray[Any, Any]:
    act = act_of(policy, deterministic)
    collector = HostCollector(environment, act, CHUNK, seed_for(seed, "evaluation"))
    total = np.zeros(environment.spec.num_envs)
    quota = -(-episodes // len(total))
    returns: list[list[float]] = [[] for _ in total]
    action_key = key_for(seed, "evaluation actions")
    for index in count():
        unfinished = [n for n, of_stream in enumerate(returns) if len(of_stream) < quota]
        if not unfinished:
            break
        if collector.time[unfinished].max() >= MAX_STEPS:
            raise _no_end()
        rollout = collector.collect(policy.acting, 1.0, jax.random.fold_in(action_key, index))
        for reward, ended, valid in zip(*counted(rollout), rollout.valid, strict=True):
            total += np.where(valid, reward, 0.0)
            for n in np.flatnonzero(ended & valid):
                returns[n].append(float(total[n]))
                total[n] = 0.0
        poll()
    return np.array([of_stream[:quota] for of_stream in returns]).ravel()[:episodes]


def _no_end() -> ValueError:
    return ValueError(
        f"After {MAX_STEPS:,} steps an episode had still not ended; give the environment a time limit "
        "(gymnasium.make(..., max_episode_steps=...) or gymnasium.wrappers.TimeLimit)."
    )
