"""Environments: a name, a callable or an object becomes one that the collector can drive."""

from __future__ import annotations

from typing import Any

from ..spaces import validate
from ..types import DeviceEnvironment, EnvironmentSpec, HostEnvironment
from .atari import atari_environment, is_atari
from .classic import CLASSIC
from .gymnasium import gymnasium_environment
from .kinds import environment_name, is_device, is_vector
from .minatar import MINATAR
from .mujoco import mujoco_environment
from .mujoco_tasks import TASKS

__all__ = ["IN_JAX", "NUM_ENVS", "environment_name", "is_device", "is_vector", "make"]

NUM_ENVS = 8  # unless the user says otherwise
IN_JAX: dict[str, DeviceEnvironment] = {**CLASSIC, **MINATAR}


def make(env: Any, num_envs: int) -> tuple[DeviceEnvironment | HostEnvironment, EnvironmentSpec]:
    """`num_envs` streams of an environment, and what a learner must know of it.

    `env` is the id of an environment written in JAX, of a MuJoCo task or an Atari game (`surefoot list envs`), any other Gymnasium
    id, `module:factory`, a callable that returns a `gymnasium.Env`, a `gymnasium.vector.VectorEnv`, or a `DeviceEnvironment`.
    `gymnasium:CartPole-v1` asks for Gymnasium's own where there is another here too.
    """
    if num_envs < 1:
        raise ValueError(f"The number of environments must be at least 1, got {num_envs}.")
    device = IN_JAX.get(env) if isinstance(env, str) else env if is_device(env) else None
    if device is not None:
        validate(device.observation_space, device.action_space)
        return device, EnvironmentSpec(device.name, device.observation_space, device.action_space, num_envs)
    if is_vector(env) and num_envs == NUM_ENVS:
        num_envs = env.num_envs  # it has its own number, and the user has not asked for another
    if is_atari(env):
        host = atari_environment(env, num_envs)
    else:
        host = (mujoco_environment if isinstance(env, str) and env in TASKS else gymnasium_environment)(env, num_envs)
    return host, host.spec
