"""What kind of thing a user gave as an environment, and what to call it."""

from __future__ import annotations

from typing import Any

from gymnasium import Env
from gymnasium.vector import VectorEnv


def is_device(env: Any) -> bool:
    """Whether `env` is pure functions, to be scanned inside the compiled program."""
    return hasattr(env, "max_episode_steps") and not isinstance(env, (Env, VectorEnv))


def is_vector(env: Any) -> bool:
    """Whether `env` is a vector environment of the user's, which stays open after a run: it may be wanted again."""
    return isinstance(env, VectorEnv)


def environment_name(env: Any) -> str:
    """How a run records `env`: the string given, a device environment's own name, or `module:name` of a class or function."""
    if isinstance(env, str):
        return env
    if is_device(env):
        return str(env.name)
    named = type(env) if is_vector(env) or not hasattr(env, "__qualname__") else env
    return f"{named.__module__}:{named.__qualname__}"
