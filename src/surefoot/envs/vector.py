"""Any Gymnasium `VectorEnv` as a `HostEnvironment`: the one place that knows Gymnasium's three ways of resetting."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from .. import spaces
from ..types import Observation, Step
from .boundary import Boundary, EnvironmentFault, first_reset, reset_result, split_mask, step_result, stream_seeds, without_tuples


class VectorEnvironment:
    """Any Gymnasium `VectorEnv`, its autoreset mode (read from its metadata) translated to `Step`.

    NEXT_STEP spends a row on each reset: `valid` is false there, and the row before it carries the terminal observation.
    SAME_STEP and DISABLED lose no row. Episodes restart on resume: a `VectorEnv` has no way to give its state.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any], name: str):
        self._env = env
        try:
            self._mode = AutoresetMode(env.metadata["autoreset_mode"])
        except (KeyError, ValueError):
            raise ValueError(
                f"{name} does not say when it resets: its metadata['autoreset_mode'] is {env.metadata.get('autoreset_mode')!r}. "
                "Set it to the gymnasium.vector.AutoresetMode that it follows: NEXT_STEP, SAME_STEP or DISABLED."
            ) from None
        obs, infos = first_reset(env, name)
        observation_space, self._mask_source = split_mask(env.single_observation_space, env.single_action_space, obs, infos)
        spaces.validate(without_tuples(observation_space), env.single_action_space)
        self._boundary = Boundary(name, observation_space, env.single_action_space, env.num_envs, self._mask_source is not None, self.close)
        self._ended = np.zeros(env.num_envs, bool)
        self.spec = self._boundary.spec(resume="episodes restart")

    def reset(self, seed: int) -> tuple[Observation, np.ndarray[Any, Any] | None]:
        """Begin every stream anew: (observation [N, ...], action mask [N, A] or None)."""
        boundary = self._boundary
        seeds = stream_seeds(seed, boundary.num_envs)
        # Only these two are known to take a seed for each stream, and then agree with `SerialEnvironment`.
        takes_list = isinstance(self._env.unwrapped, (SyncVectorEnv, AsyncVectorEnv))
        boundary.begin(seeds if takes_list else [])
        self._ended[:] = False
        try:
            obs, infos = reset_result(self._env.reset(seed=seeds if takes_list else seeds[0]))  # type: ignore[arg-type]
            self._take(obs, infos)
        except Exception as error:
            boundary.fail_with(None, error)
        boundary.check(has_ended=False)
        return boundary.first()

    def step(self, action: np.ndarray[Any, Any]) -> Step:
        """Take `action` [N, ...]; it has no effect in the rows that a NEXT_STEP environment spends on a reset."""
        boundary = self._boundary
        boundary.num_steps += 1
        actions = boundary.actions(action)
        try:
            obs, reward, terminated, truncated, infos = step_result(self._env.step(actions))
            boundary.write_outcome(reward, terminated, truncated)
            if self._mode is AutoresetMode.NEXT_STEP:
                boundary.invalidate(self._ended)
            self._ended = ended = boundary.terminated | boundary.truncated
            if self._mode is AutoresetMode.SAME_STEP:
                self._keep_final(infos, ended)
                self._take(obs, infos)
            else:  # what was returned is the true successor, in every row
                self._take(obs, infos, has_future=~boundary.terminated)
                boundary.keep_final(np.ones_like(ended))
                if self._mode is AutoresetMode.DISABLED and ended.any():
                    self._reset_rows(ended)
        except Exception as error:
            boundary.fail_with(None, error)
        boundary.check(bool(ended.any()))
        return boundary.step

    def _take(self, obs: Any, infos: dict[str, Any], has_future: np.ndarray[Any, Any] | None = None) -> None:
        """Store what to act on next, in every row."""
        self._boundary.obs.write_all(obs)
        self._write_masks(obs if self._mask_source == "obs" else infos, np.ones(self._boundary.num_envs, bool), has_future)

    def _keep_final(self, infos: dict[str, Any], ended: np.ndarray[Any, Any]) -> None:
        """SAME_STEP: the true successors are in the infos of the step that reset."""
        for index in np.flatnonzero(ended).tolist():
            if "final_obs" not in infos or not infos.get("_final_obs", ended)[index]:
                raise EnvironmentFault(
                    "its episode ended, but infos['final_obs'], which SAME_STEP promises, lacks its last observation", index
                )
            # An object array of observations, or the batched observation.
            final_obs = jax.tree.map(lambda leaf, row=index: leaf[row], infos["final_obs"])
            self._boundary.obs.write(index, final_obs)
            if self._boundary.mask is not None:
                mask = final_obs.get("action_mask") if self._mask_source == "obs" else _mask_of(infos.get("final_info", {}), index)
                self._boundary.mask.write(index, mask, has_future=not self._boundary.terminated[index])
            self._boundary.keep_final(index)

    def _reset_rows(self, ended: np.ndarray[Any, Any]) -> None:
        """DISABLED: begin the next episode in the rows that ended."""
        obs, infos = reset_result(self._env.reset(options={"reset_mask": ended.copy()}))
        self._boundary.obs.write_all(obs)
        self._boundary.obs.copy_rows(self._boundary.final_obs, ~ended)
        self._write_masks(obs if self._mask_source == "obs" else infos, ended)

    def _write_masks(self, source: dict[str, Any], rows: np.ndarray[Any, Any], has_future: np.ndarray[Any, Any] | None = None) -> None:
        if self._boundary.mask is not None:
            for index in np.flatnonzero(rows).tolist():
                self._boundary.mask.write(index, _mask_of(source, index), has_future is None or bool(has_future[index]))

    def get_state(self) -> None:
        """None: a `VectorEnv` cannot give its state."""

    def set_state(self, arrays: dict[str, np.ndarray[Any, Any]], info: dict[str, Any]) -> None:
        """There is nothing that it could be called with."""
        raise ValueError(f"{self.spec.name} is a VectorEnv, whose state cannot be set; its episodes restart.")

    def close(self) -> None:
        """Close the environments."""
        self._env.close()


def _mask_of(source: dict[str, Any], index: int) -> Any:
    """The mask of one stream in batched infos, which say with a leading underscore whose it is, or a batched observation."""
    masks = source.get("action_mask")
    return None if masks is None or not source.get("_action_mask", np.ones(len(masks), bool))[index] else masks[index]
