"""A policy to hold in one's hand: NumPy observations in, actions out, one file that is all of it."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import jax
import numpy as np

from ..algorithms import Algorithm, named, of
from ..networks import find_factory, register
from ..spaces import from_json, map_leaves, observation_dtype, to_environment, to_json
from ..types import EnvironmentSpec, Observation, PyTree
from .checkpoint import CheckpointError, read_file, restore_tree, save_file


class Policy:
    """What was learned: parameters, normaliser, spaces and configuration, which `save` keeps together."""

    def __init__(self, config: Any, spec: EnvironmentSpec, acting: PyTree, *, seed: int = 0):
        self.config, self.spec, self.acting = config, spec, acting
        self._compiled = jax.jit(partial(of(config).act, config))
        self._key, self._calls = jax.random.key(seed), 0

    @property
    def observation_space(self) -> gymnasium.Space[Any]:
        return self.spec.observation_space

    @property
    def action_space(self) -> gymnasium.Space[Any]:
        return self.spec.action_space

    def act(self, obs: Observation, deterministic: bool = True, action_mask: Any = None) -> Any:
        """The action for one observation, or an array of them for a batch with one leading axis; as the environment takes it.

        `deterministic` gives the most likely action; otherwise one is drawn from the policy's own generator.
        """
        single = self._is_single(obs)
        batch = map_leaves(lambda space, x: np.asarray(x, observation_dtype(space)), self.observation_space, obs)
        if single:
            batch = jax.tree.map(lambda x: x[None], batch)
        mask = None if action_mask is None else np.asarray(action_mask, bool).reshape(1 if single else -1, self.action_space.n)
        key = None
        if not deterministic:
            self._calls += 1
            key = jax.random.fold_in(self._key, self._calls)
        action, _ = self._compiled(self.acting, batch, mask, None, key)
        actions = to_environment(self.action_space, np.asarray(action))
        return actions[0] if single else actions

    def _is_single(self, obs: Observation) -> bool:
        extra: set[int] = set()

        def compare(space: gymnasium.Space[Any], x: Any) -> None:
            shape = np.shape(x)
            if shape[len(shape) - len(space.shape) :] != space.shape or len(shape) - len(space.shape) not in (0, 1):
                raise ValueError(f"An observation of shape {space.shape}, or a batch [N, ...] of them, was expected; got shape {shape}.")
            extra.add(len(shape) - len(space.shape))

        try:
            map_leaves(compare, self.observation_space, obs)
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"The observation does not fit {self.observation_space}: {error!r}.") from error
        if len(extra) != 1:
            raise ValueError("Some entries of the observation are single and some are batches.")
        return extra == {0}

    def save(self, path: str | Path) -> Path:
        """Write the policy to one file that `surefoot.load` reads."""
        return save_file(Path(path), self.acting, describe(self.config, self.spec))


def describe(config: Any, spec: EnvironmentSpec) -> dict[str, Any]:
    """Algorithm, configuration and spaces as JSON."""
    return {
        "algorithm": of(config).name,
        "config": {name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(config).items()},
        "environment": spec.name,
        "observation_space": to_json(spec.observation_space),
        "action_space": to_json(spec.action_space),
        "has_action_mask": spec.has_action_mask,
        "num_envs": spec.num_envs,
    }


def undescribe(info: dict[str, Any]) -> tuple[Algorithm, Any, EnvironmentSpec]:
    """What `describe` described; CheckpointError where it does not make sense."""
    try:
        algorithm = named(info["algorithm"])
        config = algorithm.config(**info["config"])
        spaces = from_json(info["observation_space"]), from_json(info["action_space"])
        return algorithm, config, EnvironmentSpec(str(info["environment"]), *spaces, int(info["num_envs"]), bool(info["has_action_mask"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"The description of the policy makes no sense here: {error}") from error


def load(path: str | Path, network: Any = None) -> Policy:
    """The policy in a file or a run directory. Nothing is executed or imported.

    Args:
        network: the class that the policy's own network is an instance of, where the program has not imported its module.

    Raises:
        CheckpointError: not a policy of this version, corrupt, or of a network that is not at hand.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "policy.safetensors"
    arrays, info = read_file(path)
    algorithm, config, spec = undescribe(info)
    if config.network != "mlp":
        if network is not None:
            register(config.network, network)
        try:
            find_factory(config.network, import_module=False)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
    template = jax.eval_shape(partial(algorithm.init, config, spec), jax.random.key(0)).acting
    return Policy(config, spec, restore_tree(arrays, template, source=str(path)))
