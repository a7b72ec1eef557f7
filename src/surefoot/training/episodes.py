"""Episodes as they end: their returns, lengths, and what the recent ones were like."""

from __future__ import annotations

import math
from collections import deque
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..math.returns import time_discount
from ..types import Rollout, counted


class Running(NamedTuple):
    """Sums over the episodes that are under way, [N]; the discounted ones over those that are learned from."""

    episode_return: jax.Array
    discounted_return: jax.Array
    length: jax.Array  # int32

    @classmethod
    def start(cls, num_envs: int) -> Running:
        return cls(jnp.zeros(num_envs), jnp.zeros(num_envs), jnp.zeros(num_envs, jnp.int32))


class Ended(NamedTuple):
    """Rows [T, N] at which an episode ended, and what it came to."""

    here: jax.Array
    learned: jax.Array  # where one ended that is learned from, which `discounted_return` is of
    episode_return: jax.Array
    discounted_return: jax.Array
    length: jax.Array


def follow(running: Running, rollout: Rollout, *, discount: float) -> tuple[Running, Ended]:
    """Carry the running sums through a rollout."""
    (score, over), valid = counted(rollout), rollout.valid
    discounted = time_discount(rollout.time, discount=discount) * rollout.reward
    gains = jax.tree.map(lambda x: jnp.where(valid, x, 0), Running(score, discounted, jnp.ones_like(rollout.time)))
    over, learned = over & valid, (rollout.terminated | rollout.truncated) & valid

    def step(running: Running, row: tuple[Running, Running]) -> tuple[Running, Running]:
        now = jax.tree.map(jnp.add, running, row[0])
        return jax.tree.map(lambda total, ended: jnp.where(ended, 0, total), now, row[1]), now

    running, sums = jax.lax.scan(step, running, (gains, Running(over, learned, over)))
    return running, Ended(over, learned, *sums)


class Recent:
    """What finished lately, on the host: the last hundred episodes, and the discounted returns batch by batch."""

    def __init__(self) -> None:
        self.returns: deque[float] = deque(maxlen=100)
        self.lengths: deque[int] = deque(maxlen=100)
        self.episodes = 0
        self.previous: tuple[float, float] | None = None  # the last batch's mean discounted return and its standard error

    def take(self, ended: Ended) -> dict[str, float | int | None]:
        """Count a batch's episodes in: the metrics of episodes, with the realised improvement over the batch before."""
        here = np.asarray(ended.here)
        self.returns.extend(np.asarray(ended.episode_return)[here].tolist())
        self.lengths.extend(np.asarray(ended.length)[here].tolist())
        self.episodes += int(np.count_nonzero(here))
        discounted = np.asarray(ended.discounted_return)[np.asarray(ended.learned)]
        now = None
        if len(discounted):
            error = float(discounted.std(ddof=1)) / math.sqrt(len(discounted)) if len(discounted) > 1 else math.nan
            now = float(discounted.mean()), error
        improvement = (now[0] - self.previous[0], math.hypot(now[1], self.previous[1])) if now and self.previous else (None, None)
        self.previous = now or self.previous
        return {
            "episodes": self.episodes,
            "episode_return": float(np.mean(self.returns)) if self.returns else None,
            "episode_length": float(np.mean(self.lengths)) if self.lengths else None,
            "discounted_return": now[0] if now else None,
            "realised_improvement": improvement[0],
            "realised_improvement_error": improvement[1],
        }

    def to_json(self) -> dict[str, Any]:
        return {"returns": list(self.returns), "lengths": list(self.lengths), "episodes": self.episodes, "previous": self.previous}

    def restore(self, data: dict[str, Any]) -> None:
        self.returns.extend(data["returns"])
        self.lengths.extend(data["lengths"])
        self.episodes = data["episodes"]
        self.previous = tuple(data["previous"]) if data["previous"] else None
