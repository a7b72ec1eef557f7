"""Environments: a name, a callable or an object becomes one that the collector can drive."""

from __future__ import annotations

import importlib
from typing import Any

import gymnasium

from ..spaces import validate
from ..types import DeviceEnvironment, EnvironmentSpec, HostEnvironment
from .classic import CLASSIC

Environment = DeviceEnvironment | HostEnvironment


def is_device(environment: Any) -> bool:
    """Whether `environment` is pure functions, to be scanned inside the compiled program."""
    return hasattr(environment, "max_episode_steps") and not isinstance(environment, (gymnasium.Env, gymnasium.vector.VectorEnv))


def environment_name(env: Any) -> str:
    """How a run records `env`: the string given, a device environment's own name, or `module:name` of a callable."""
    if isinstance(env, str):
        return env
    if is_device(env):
        return str(env.name)
    if isinstance(env, gymnasium.vector.VectorEnv):
        return f"{type(env).__module__}:{type(env).__qualname__}"
    return f"{getattr(env, '__module__', '?')}:{getattr(env, '__qualname__', type(env).__qualname__)}"


def make(env: Any, num_envs: int) -> tuple[Environment, EnvironmentSpec]:
    """`num_envs` streams of an environment, and what a learner must know of it.

    `env` is the id of an environment written in JAX (`surefoot list envs`), any other Gymnasium id, `module:factory`, a
    callable that returns a `gymnasium.Env`, a `gymnasium.vector.VectorEnv`, or a `DeviceEnvironment`.
    `gymnasium:CartPole-v1` asks for Gymnasium's own where there is one in JAX too.
    """
    if num_envs < 1:
        raise ValueError(f"The number of environments must be at least 1, got {num_envs}.")
    device = CLASSIC.get(env) if isinstance(env, str) else env if is_device(env) else None
    if device is not None:
        validate(device.observation_space, device.action_space)
        return device, EnvironmentSpec(device.name, device.observation_space, device.action_space, num_envs)
    # Gymnasium's own environments are slow to import and most runs of the built-in ones never need them.
    host = importlib.import_module(".gymnasium", __name__).gymnasium_environment(env, num_envs)
    return host, host.spec
