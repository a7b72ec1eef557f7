"""The records that flow from environment to gradient, and the contract of an environment.

Time-major everywhere: `T` steps by `N` parallel streams (environments, or prompts). `terminated` and `truncated` stay
apart until the function that needs them. An observation is one array or a dictionary of arrays (`...` below).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import gymnasium
import jax
import numpy as np

Array = jax.Array | np.ndarray[Any, Any]
Observation = Any  # an array, or a (nested) dictionary of arrays
PyTree = Any


class Step(NamedTuple):
    """What an environment of N streams answers to one action per stream.

    A row with `valid` false is one that a vector environment spent on a reset: no action was taken in it, and it reaches
    no loss, statistic, normaliser or audit.
    """

    obs: Observation  # [N, ...] what to act on next; the first observation of the new episode where one ended
    reward: Array  # [N] float32
    terminated: Array  # [N] bool; the successor has no future
    truncated: Array  # [N] bool; the episode was cut and its successor has a future
    final_obs: Observation  # [N, ...] true successor of every ended row; elsewhere unspecified but finite
    valid: Array  # [N] bool
    action_mask: Array | None = None  # [N, A] bool, legal actions in `obs`
    final_action_mask: Array | None = None  # [N, A] bool, legal actions in `final_obs`
    # What results count, where it is not what is learned from; an episode that ends there ends for the learner too.
    score: Array | None = None  # [N] float32, in place of `reward`: Atari's before clipping
    game_over: Array | None = None  # [N] bool, where an episode ended: in Atari a game, and not a life


class Rollout(NamedTuple):
    """T steps of N streams as the learner sees them. Row (t, n) holds the transition that `action[t, n]` caused."""

    obs: Observation  # [T, N, ...] what was acted on
    action: Array  # [T, N, ...] in the policy's own units (see `spaces.to_environment`)
    reward: Array  # [T, N] float32
    terminated: Array  # [T, N] bool
    truncated: Array  # [T, N] bool
    final_obs: Observation  # [T, N, ...] true successor of every ended row
    valid: Array  # [T, N] bool
    time: Array  # [T, N] int32, steps since the episode's reset: the t of gamma^t
    last_obs: Observation  # [N, ...] what will be acted on after the last row
    progress: Array  # [] float32, the fraction of the run that was over when collecting began: what schedules follow
    action_mask: Array | None = None  # [T, N, A] bool
    final_action_mask: Array | None = None  # [T, N, A] bool
    last_action_mask: Array | None = None  # [N, A] bool
    score: Array | None = None  # [T, N] float32, as in `Step`
    game_over: Array | None = None  # [T, N] bool
    carry: PyTree = None  # [N, ...] recurrent state before the first row; acting starts from zeros instead wherever `time` is 0
    acting: PyTree = None  # what acted, where it may not be the learner's `acting` any more


def counted(rows: Any) -> tuple[Array, Array]:
    """(rewards, where episodes end) of a `Step` or a `Rollout` as results count them, whatever is learned from."""
    over = rows.terminated | rows.truncated if rows.game_over is None else rows.game_over
    return rows.reward if rows.score is None else rows.score, over


@dataclass(frozen=True)
class EnvironmentSpec:
    """What a learner must know of an environment before the first step."""

    name: str  # as given by the user: an id, or the factory's name
    observation_space: gymnasium.Space[Any]  # of one stream, without the mask
    action_space: gymnasium.Space[Any]  # of one stream
    num_envs: int
    has_action_mask: bool = False
    resume: Literal["exact", "episodes restart"] = "exact"  # what a resumed run can promise
    # K > 1: the first axis of a Box observation holds K successive frames, the newest last. What would be before an episode's first
    # frame is zeros, and so for the learner's episodes where they are shorter than the environment's.
    frame_stack: int = 1
    settings: dict[str, Any] | None = None  # JSON, all that decides how the environment is played beyond what its name says


class DeviceEnvironment(Protocol):
    """One environment as pure functions; the collector maps them over N streams inside the compiled program."""

    name: str
    observation_space: gymnasium.Space[Any]
    action_space: gymnasium.Space[Any]
    max_episode_steps: int  # the collector truncates here

    def reset(self, key: jax.Array) -> tuple[PyTree, Observation]:
        """Start an episode: (state, first observation). A stochastic environment keeps its key in the state."""

    def step(self, state: PyTree, action: jax.Array) -> tuple[PyTree, Observation, jax.Array, jax.Array]:
        """(state, observation, reward, terminated) after `action`, given in the action space's own units."""


class HostEnvironment(Protocol):
    """N streams stepped from Python. Every array that `reset` and `step` return may be overwritten by the next call."""

    spec: EnvironmentSpec

    def reset(self, seed: int) -> tuple[Observation, Array | None]:
        """Begin every stream anew from `seed`: (observation [N, ...], action mask [N, A] or None)."""

    def step(self, action: np.ndarray[Any, Any]) -> Step:
        """Take `action` [N, ...], given in the action space's own units."""

    def get_state(self) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]] | None:
        """Everything `set_state` needs to go on bit for bit (arrays, and a JSON object); None where it cannot be had."""

    def set_state(self, arrays: dict[str, np.ndarray[Any, Any]], info: dict[str, Any]) -> None:
        """Continue from what `get_state` gave."""

    def close(self) -> None:
        """Release the environments."""
