"""Gymnasium environments as `HostEnvironment`s: an own serial loop over N of them, and the one door to all kinds.

The serial loop resets in the step that ends an episode, so it spends no row on resets.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import gymnasium
import numpy as np
from gymnasium.vector import VectorEnv

from .. import spaces
from ..types import HostEnvironment, Observation, Step
from . import snapshot
from .boundary import (
    FLAG_TYPES,
    OLD_GYM,
    PROBE_SEED,
    REWARD_TYPES,
    Boundary,
    EnvironmentFault,
    checked_flag,
    checked_reward,
    describe,
    first_reset,
    reset_result,
    split_mask,
    step_result,
    stream_seeds,
    warn,
    without_tuples,
)
from .kinds import environment_name
from .minatar import MINATAR
from .mujoco_tasks import TASKS
from .vector import VectorEnvironment

Env = gymnasium.Env[Any, Any]


class SerialEnvironment:
    """N Gymnasium environments stepped one after the other, each reset in the step that ends its episode.

    Raises ValueError where spaces are not supported or differ among the N, and `EnvironmentFault` for what the
    environments do wrong, at construction or later; all of them are then closed.
    """

    def __init__(self, make: Callable[[], Env], num_envs: int, name: str):
        self._envs: list[Env] = []
        try:
            with quiet():
                for _ in range(num_envs):
                    self._envs.append(build(make, name))
                self._refuse_differences(name)
                self._probe(name)
        except BaseException:
            with contextlib.suppress(Exception):
                self.close()
            raise

    def _refuse_differences(self, name: str) -> None:
        if len({id(env) for env in self._envs}) < len(self._envs):
            raise ValueError(f"{name} gives the same object at each call; return a new environment, so that {len(self._envs)} can run.")
        first = self._envs[0]
        for index, env in enumerate(self._envs):
            for kind in ("observation_space", "action_space"):
                if getattr(env, kind) != getattr(first, kind):
                    raise ValueError(
                        f"{name}: the {kind} of environment {index} is {getattr(env, kind)}, that of environment 0 is "
                        f"{getattr(first, kind)}; environments that run together need equal spaces."
                    )

    def _probe(self, name: str) -> None:
        """Learn from two resets of the first environment with one seed what its spaces do not say."""
        env = self._envs[0]
        obs, info = first_reset(env, name)
        observation_space, self._mask_source = split_mask(env.observation_space, env.action_space, obs, info)
        spaces.validate(without_tuples(observation_space), env.action_space)
        has_mask = self._mask_source is not None
        boundary = self._boundary = Boundary(name, observation_space, env.action_space, len(self._envs), has_mask, self.close)
        try:
            boundary.obs.write(0, obs)
            first = boundary.obs.row(0)
            obs, _ = reset_result(env.reset(seed=PROBE_SEED))
            boundary.obs.write(0, obs)
        except Exception as error:
            boundary.fail_with(0, error)
        is_seeded = all(np.array_equal(old, new, equal_nan=True) for old, new in zip(first, boundary.obs.row(0), strict=True))
        if not is_seeded:
            warn(
                f"{name}: reset ignores its seed, so the run cannot be repeated or resumed exactly; "
                "call super().reset(seed=seed) and draw from self.np_random."
            )
        is_exact = is_seeded and all(snapshot.is_exact(env) for env in self._envs)
        self.spec = boundary.spec("exact" if is_exact else "episodes restart")

    def reset(self, seed: int) -> tuple[Observation, np.ndarray[Any, Any] | None]:
        """Begin every stream anew: (observation [N, ...], action mask [N, A] or None).

        Each environment gets its own seed, once; its later episodes go on with its own generator.
        """
        boundary = self._boundary
        boundary.begin(stream_seeds(seed, len(self._envs)))
        index = 0
        try:
            for index, env in enumerate(self._envs):
                self._take(index, *reset_result(env.reset(seed=boundary.seeds[index])))
        except Exception as error:
            boundary.fail_with(index, error)
        boundary.check(has_ended=False)
        return boundary.first()

    def step(self, action: np.ndarray[Any, Any]) -> Step:
        """Take `action` [N, ...]. Rows that ended hold the next episode's first observation; `valid` is true in all."""
        boundary = self._boundary
        boundary.num_steps += 1
        actions = boundary.actions(action)
        has_ended, index = False, 0
        try:
            for index, env in enumerate(self._envs):
                obs, reward, terminated, truncated, info = step_result(env.step(actions[index]))
                if type(terminated) not in FLAG_TYPES or type(truncated) not in FLAG_TYPES:
                    terminated, truncated = checked_flag("terminated", terminated), checked_flag("truncated", truncated)
                boundary.reward[index] = reward if type(reward) in REWARD_TYPES else checked_reward(reward)
                boundary.terminated[index] = terminated
                boundary.truncated[index] = truncated
                self._take(index, obs, info, has_future=not terminated)
                if terminated or truncated:
                    has_ended = True
                    boundary.keep_final(index)
                    self._take(index, *reset_result(env.reset()))
        except Exception as error:
            boundary.fail_with(index, error)
        boundary.check(has_ended)
        return boundary.step

    def _take(self, index: int, obs: Any, info: dict[str, Any], has_future: bool = True) -> None:
        """Store what stream `index` is to act on next."""
        boundary = self._boundary
        boundary.obs.write(index, obs)
        if boundary.mask is not None:
            boundary.mask.write(index, (obs if self._mask_source == "obs" else info).get("action_mask"), has_future)

    def get_state(self) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]] | None:
        """Everything `set_state` needs to go on bit for bit; None unless `spec.resume` is "exact"."""
        if self.spec.resume != "exact":
            return None
        arrays: dict[str, np.ndarray[Any, Any]] = {}
        infos = []
        for index, env in enumerate(self._envs):
            own_arrays, info = snapshot.save(env)
            arrays |= {f"{index}.{name}": array for name, array in own_arrays.items()}
            infos.append(info)
        return arrays, {"num_steps": self._boundary.num_steps, "seeds": self._boundary.seeds, "environments": infos}

    def set_state(self, arrays: dict[str, np.ndarray[Any, Any]], info: dict[str, Any]) -> None:
        """Continue from what `get_state` gave. Raises ValueError where it was given for another number of environments."""
        if len(info["environments"]) != len(self._envs):
            raise ValueError(
                f"The state holds {len(info['environments'])} environments, and this run has {len(self._envs)}; use the same number."
            )
        self._boundary.num_steps, self._boundary.seeds = info["num_steps"], info["seeds"]
        for index, (env, own) in enumerate(zip(self._envs, info["environments"], strict=True)):
            prefix = f"{index}."
            snapshot.load(env, {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}, own)

    def close(self) -> None:
        """Close every environment, also where one of them fails to."""
        with contextlib.ExitStack() as stack:
            for env in self._envs:
                stack.callback(env.close)


def gymnasium_environment(env: str | Env | VectorEnv[Any, Any, Any] | Callable[[], Any], num_envs: int | None) -> HostEnvironment:
    """N streams of `env`: a Gymnasium id, "module:Id-v0", "module:factory", a callable, or a `VectorEnv` (or a callable giving one).

    `num_envs` None takes a `VectorEnv` as large as it is, and one of any other.

    Raises ValueError, with the nearest registered ids, where there is no such environment, and where a package is missing.
    """
    if num_envs is not None and num_envs < 1:
        raise ValueError(f"num_envs is {num_envs}; at least one environment is needed.")
    if isinstance(env, str):
        return _from_maker(maker(env), num_envs, env)
    if isinstance(env, gymnasium.Env) and num_envs not in (None, 1):
        raise ValueError(
            f"{env} is one environment, and {num_envs} are to run; give an id, or a function that builds a new one at each call."
        )
    if isinstance(env, (gymnasium.Env, VectorEnv)):
        return _from_maker(lambda: env, num_envs, environment_name(env))
    if callable(env):
        return _from_maker(env, num_envs, environment_name(env))
    raise ValueError(
        f"the environment is {describe(env)}; give a Gymnasium id, 'module:factory', a function that builds one, or a VectorEnv."
    )


def _from_maker(make: Callable[[], Any], num_envs: int | None, name: str) -> HostEnvironment:
    with quiet():
        first = build(make, name)
        if isinstance(first, VectorEnv):
            if num_envs not in (None, first.num_envs):
                raise ValueError(f"{name} holds {first.num_envs} environments, and num_envs is {num_envs}; make them equal.")
            return VectorEnvironment(first, name)
        if first.spec is not None and first.spec.id in TASKS and first.spec.id != name:
            warn(
                f"{name} is stepped in Gymnasium's own loop, one environment at a time. Where arguments and wrappers are the default ones, "
                f"{first.spec.id!r} gives the same environment, stepped on threads."
            )
        waiting = [first]
        return SerialEnvironment(lambda: waiting.pop() if waiting else make(), num_envs or 1, name)


def maker(name: str) -> Callable[..., Any]:
    """The function that builds what `name` stands for."""
    module_name, _, attribute = name.rpartition(":")
    if module_name:
        try:
            factory: Any = getattr(importlib.import_module(module_name), attribute, None)
        except ModuleNotFoundError as error:
            raise ValueError(f"{name!r}: {error}; the part before the colon must be a module that Python can import from here.") from error
        if callable(factory):
            return cast("Callable[..., Any]", factory)
    return partial(gymnasium.make, name, disable_env_checker=True)


def build(make: Callable[[], Any], name: str) -> Any:
    """One environment, or a ValueError that says what is missing."""
    try:
        env = make()
    except (gymnasium.error.UnregisteredEnv, gymnasium.error.DeprecatedEnv) as error:
        near = difflib.get_close_matches(name.rpartition(":")[2], [*gymnasium.registry, *MINATAR], n=3)
        near_text = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"There is no environment {name!r}.{near_text} A class of your own is given as 'module:factory'.") from error
    except (gymnasium.error.DependencyNotInstalled, ModuleNotFoundError) as error:
        extra = re.search(r"gymnasium\[[\w,-]+\]", str(error))
        remedy = f'pip install "{extra[0]}"' if extra else "install it"
        raise ValueError(f"{name} needs a package that is not installed ({error}): {remedy}.") from error
    except Exception as error:
        raise EnvironmentFault(f"{name}: building it raised {type(error).__name__}: {error}.") from error
    if isinstance(env, (gymnasium.Env, VectorEnv)):
        return env
    hint = OLD_GYM if callable(getattr(env, "step", None)) else "return a gymnasium.Env or a gymnasium.vector.VectorEnv"
    raise EnvironmentFault(f"{name} built {describe(env)}; {hint}.")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence Gymnasium's own logger, which colours its warnings, and nothing else."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(\x1b\[[\d;]+m)?(WARN|ERROR): ")
        yield
