"""Policy times environment: rollouts from device environments inside the compiled program, from host environments by a loop."""

from __future__ import annotations

import time
from collections import deque
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .policies import begin_episodes, where_rows
from .spaces import map_leaves, observation_dtype, to_environment, zeros
from .staging import host_actor
from .types import Array, DeviceEnvironment, HostEnvironment, Observation, PyTree, Rollout


class Stream(NamedTuple):
    """Where N device environments stand between two rollouts."""

    state: PyTree  # [N, ...] of the environment
    obs: Observation  # [N, ...] to act on next
    time: jax.Array  # [N] int32, steps since the reset
    keys: jax.Array  # [N] each environment's own generator of episodes
    carry: PyTree = None  # [N, ...] recurrent state


def start_stream(environment: DeviceEnvironment, num_envs: int, key: jax.Array, act: Any = None) -> Stream:
    """Begin an episode in each of N environments, with an empty memory of the shape that `act` has."""
    keys, reset_keys = split_each(jax.random.split(key, num_envs))
    state, obs = jax.vmap(environment.reset)(reset_keys)
    obs = as_observation(environment, obs)
    carry = None if act is None else empty(jax.eval_shape(act, obs, None, None, key)[1])
    return Stream(state, obs, jnp.zeros(num_envs, jnp.int32), keys, carry)


def empty(shapes: PyTree) -> PyTree:
    """Zeros in these shapes."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def split_each(keys: jax.Array) -> tuple[jax.Array, ...]:
    """Two new keys from each of N."""
    return tuple(jax.vmap(jax.random.split, out_axes=1)(keys))


def as_observation(environment: DeviceEnvironment, obs: Observation) -> Observation:
    """`obs` in the dtypes in which observations are kept."""
    return map_leaves(lambda space, x: x.astype(observation_dtype(space)), environment.observation_space, obs)


def scan_rollout(
    environment: DeviceEnvironment, act: Any, stream: Stream, num_steps: int, progress: jax.Array, key: jax.Array
) -> tuple[Stream, Rollout]:
    """`num_steps` steps of every environment inside one scan. `act(obs, action_mask, carry, key) -> (action, carry)`."""

    def step(stream: Stream, key: jax.Array) -> tuple[Stream, dict[str, Any]]:
        action, carry = act(stream.obs, None, begin_episodes(stream.carry, stream.time), key)
        state, obs, reward, terminated = jax.vmap(environment.step)(stream.state, to_environment(environment.action_space, action))
        obs, elapsed = as_observation(environment, obs), stream.time + 1
        truncated = elapsed >= environment.max_episode_steps
        ended = terminated | truncated

        def begin(going_on: tuple[PyTree, Observation, jax.Array]) -> tuple[PyTree, Observation, jax.Array]:
            keys, reset_keys = split_each(stream.keys)
            state, obs = jax.vmap(environment.reset)(reset_keys)
            fresh = state, as_observation(environment, obs), keys
            return jax.tree.map(lambda new, old: where_rows(ended, new, old), fresh, going_on)

        # Episodes seldom end: a branch is cheaper than a reset computed at every step.
        state, next_obs, keys = jax.lax.cond(jnp.any(ended), begin, lambda going_on: going_on, (state, obs, stream.keys))
        row = {"obs": stream.obs, "action": action, "reward": reward.astype(jnp.float32), "final_obs": obs, "time": stream.time}
        row |= {"terminated": terminated, "truncated": truncated, "valid": jnp.ones_like(ended)}
        return Stream(state, next_obs, jnp.where(ended, 0, elapsed), keys, carry), row

    start = stream.carry
    stream, rows = jax.lax.scan(step, stream, jax.random.split(key, num_steps))
    return stream, Rollout(**rows, last_obs=stream.obs, progress=progress, carry=start)


class HostCollector:
    """Drives a host environment from Python: one small compiled call for each vector step, rows written into buffers."""

    def __init__(self, environment: HostEnvironment, act: Any, num_steps: int, seed: int, num_rollouts: int = 1):
        """`act(acting, obs, action_mask, carry, key) -> (action [N, ...], carry)`, where a carry of None means the first step.

        The arrays of a rollout are overwritten by the `num_rollouts`-th call of `collect` after it.
        """
        spec = environment.spec
        shape = num_steps, spec.num_envs

        def act_at(acting: PyTree, key: jax.Array, t: Any, obs: Observation, mask: Any, carry: PyTree, time: Any) -> Any:
            action, carry = act(acting, obs, mask, begin_episodes(carry, time), jax.random.fold_in(key, t))
            return action, to_environment(spec.action_space, action), carry

        self.environment, self.act_at, self.actor = environment, act_at, None
        self.obs, self.action_mask = environment.reset(seed)
        self.time = np.zeros(spec.num_envs, np.int32)
        self.carry: PyTree = None

        def buffers() -> dict[str, Any]:
            """Where an observation is not needed (most rows' final_obs) the buffer keeps what it had: zeros, or an older row."""
            rows: dict[str, Any] = {
                "obs": zeros(spec.observation_space, *shape),
                "reward": np.zeros(shape, np.float32),
                "terminated": np.zeros(shape, bool),
                "truncated": np.zeros(shape, bool),
                "final_obs": zeros(spec.observation_space, *shape),
                "valid": np.zeros(shape, bool),
                "time": np.zeros(shape, np.int32),
            }
            if self.action_mask is not None:
                rows |= {name: np.ones((*shape, self.action_mask.shape[-1]), bool) for name in ("action_mask", "final_action_mask")}
            return rows

        self.rows = deque(buffers() for _ in range(num_rollouts))  # those of the next rollout first
        self.num_steps = num_steps
        self.seconds = {"environment": 0.0, "acting": 0.0}

    def collect(self, acting: PyTree, progress: float, key: jax.Array, ahead: PyTree = None) -> Rollout:
        """The next `num_steps` steps; with what `actor.ahead` gave for them nothing is drawn from `key`."""
        rows, actions = self.rows[0], []
        self.rows.rotate()
        began = time.perf_counter()
        if self.actor is None:
            *_, carry = jax.eval_shape(self.act_at, acting, key, 0, self.obs, self.action_mask, None, self.time)
            restored = jax.tree.leaves(self.carry)
            self.carry = jax.tree.unflatten(jax.tree.structure(carry), restored or map(np.asarray, jax.tree.leaves(empty(carry))))
            observed = self.obs, self.action_mask, self.carry, self.time
            self.actor = host_actor(self.act_at, acting, key, observed, self.num_steps)
        self.actor.begin(acting, key, ahead)
        self.seconds["acting"] += time.perf_counter() - began
        start = self.carry
        for t in range(self.num_steps):
            began = time.perf_counter()
            action, taken, self.carry = self.actor(t, self.obs, self.action_mask, self.carry, self.time)
            actions.append(np.asarray(action))
            write(rows["obs"], t, self.obs)
            rows["time"][t] = self.time
            if self.action_mask is not None:
                rows["action_mask"][t] = self.action_mask
            acted = time.perf_counter()
            step = self.environment.step(np.asarray(taken))
            self.seconds["acting"] += acted - began
            self.seconds["environment"] += time.perf_counter() - acted
            rows["reward"][t], rows["valid"][t] = step.reward, step.valid
            rows["terminated"][t], rows["truncated"][t] = step.terminated, step.truncated
            if step.score is not None:
                rows.setdefault("score", np.zeros_like(rows["reward"]))[t] = step.score
            if step.game_over is not None:
                rows.setdefault("game_over", np.zeros_like(rows["valid"]))[t] = step.game_over
            self.time += step.valid
            ended = step.terminated | step.truncated
            if np.count_nonzero(ended):
                self.time[ended] = 0
                write(rows["final_obs"], t, step.final_obs)
                if step.final_action_mask is not None:
                    rows["final_action_mask"][t] = step.final_action_mask
            self.obs, self.action_mask = step.obs, step.action_mask
        last_obs, last_action_mask = jax.tree.map(np.copy, (self.obs, self.action_mask))  # the next step writes over what these refer to
        return Rollout(
            **rows,
            action=np.stack(actions),
            last_obs=last_obs,
            last_action_mask=last_action_mask,
            progress=np.float32(progress),
            carry=start,
        )

    def get_state(self) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]] | None:
        """The environment's state with what is to be acted on next; None where the environment cannot give its own."""
        state = self.environment.get_state()
        if state is None:
            return None
        arrays, info = state
        own = {"time": self.time, **flat("obs", self.obs), **{f"carry.{i}": leaf for i, leaf in enumerate(jax.tree.leaves(self.carry))}}
        if self.action_mask is not None:
            own["action_mask"] = self.action_mask
        own = {name: np.array(array) for name, array in own.items()}  # the next step writes over what these refer to
        return {**{f"environment.{name}": array for name, array in arrays.items()}, **own}, info

    def set_state(self, arrays: dict[str, np.ndarray[Any, Any]], info: dict[str, Any]) -> None:
        """Continue from what `get_state` gave."""
        prefix = "environment."
        self.environment.set_state({name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}, info)
        self.time = arrays["time"].copy()
        for name, buffer in flat("obs", self.obs).items():
            buffer[...] = arrays[name]
        if self.action_mask is not None:
            self.action_mask = arrays["action_mask"].copy()
        kept = [arrays[f"carry.{i}"] for i in range(sum(name.startswith("carry.") for name in arrays))]
        self.carry = kept if self.actor is None else jax.tree.unflatten(jax.tree.structure(self.carry), kept)  # else shaped by `collect`


def write(buffer: Observation, index: int, obs: Observation) -> None:
    """`buffer[index] = obs` at every leaf."""
    if isinstance(buffer, dict):
        for key, leaf in buffer.items():
            write(leaf, index, obs[key])
    else:
        buffer[index] = obs


def as_rollout(arrays: dict[str, np.ndarray[Any, Any]], like: Observation) -> Rollout:
    """The rollout, without a memory, whose leaves are these `arrays` by path; its observations have the structure of `like`."""

    def observation(name: str, like: Observation) -> Observation:
        return {key: observation(f"{name}.{key}", sub) for key, sub in like.items()} if isinstance(like, dict) else arrays[name]

    observations = {name: observation(name, like) for name in ("obs", "final_obs", "last_obs")}
    return Rollout(**{name: arrays[name] for name in Rollout._fields if name in arrays} | observations)


def flat(name: str, obs: Observation) -> dict[str, Array]:
    """The leaves of an observation by path."""
    if isinstance(obs, dict):
        return {path: leaf for key, sub in obs.items() for path, leaf in flat(f"{name}.{key}", sub).items()}
    return {name: obs}
