"""A policy to hold in one's hand: NumPy observations in, actions out, one file that is all of it."""

from __future__ import annotations

import dataclasses
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import gymnasium
import jax
import numpy as np

from ..algorithms import Algorithm, named, of
from ..networks import find_factory, own_network, register
from ..policies import begin_episodes
from ..spaces import choices, from_json, map_leaves, observation_dtype, to_environment, to_json, validate
from ..types import EnvironmentSpec, Observation, PyTree
from .checkpoint import CheckpointError, read_file, restore_tree, save_file


class Policy:
    """What was learned: parameters, normaliser, spaces and configuration, which `save` keeps together."""

    def __init__(self, config: Any, spec: EnvironmentSpec, acting: PyTree, *, seed: int = 0):
        self.config, self.spec, self.acting = config, spec, acting
        self._seed, self._calls = seed, 0
        self._carry, self._carry_leading = None, ()  # what is remembered, and of how many streams

    @cached_property
    def _key(self) -> jax.Array:
        return jax.random.key(self._seed)  # made where it is used: a run makes a policy for every report

    @property
    def observation_space(self) -> gymnasium.Space[Any]:
        return self.spec.observation_space

    @property
    def action_space(self) -> gymnasium.Space[Any]:
        return self.spec.action_space

    def act(self, obs: Observation, deterministic: bool = True, action_mask: Any = None) -> Any:
        """The action for one observation, or an array of them for a batch with one leading axis; as the environment takes it.

        `deterministic` gives the most likely action; otherwise one is drawn from the policy's own generator. A policy with a
        memory remembers the observations that it was given since the last `reset`.

        Raises ValueError for an observation or a mask ([n], or [N, n] for a batch) that does not fit the policy's spaces, and
        for another number of observations than the memory is of.
        """
        batch, leading = self._checked(obs)
        mask = None if action_mask is None else self._checked_mask(action_mask, leading)
        if single := leading == ():
            batch, mask = jax.tree.map(lambda x: x[None], (batch, mask))
        key = None
        if not deterministic:
            self._calls += 1
            key = jax.random.fold_in(self._key, self._calls)
        if self._carry is not None and leading != self._carry_leading:
            given = "one observation" if single else f"a batch of {leading[0]}"
            raise ValueError(f"The policy remembers other observations than {given}; call reset() where new episodes begin.")
        actions, self._carry = _act(self.config, self.acting, batch, mask, self._carry, key)
        self._carry_leading = leading
        actions = to_environment(self.action_space, np.asarray(actions))
        return actions[0] if single else actions

    def reset(self, began: Any = None) -> None:
        """Forget what was seen: in all streams, or in those of a batch where `began` [N] is true, as their episodes begin."""
        if began is None or self._carry is None:
            self._carry = None
            return
        began = np.asarray(began, bool)
        if began.shape != self._carry_leading:
            raise ValueError(
                f"reset expects one truth value for each of the streams, shape {self._carry_leading}; got shape {began.shape}."
            )
        self._carry = begin_episodes(self._carry, np.where(began, 0, 1))

    def _checked(self, obs: Observation) -> tuple[Observation, tuple[int, ...]]:
        """The observation in the dtypes of its space, and the shape before an observation's own: () or (N,)."""
        leading: set[tuple[int, ...]] = set()

        def leaf(space: gymnasium.Space[Any], x: Any) -> np.ndarray[Any, Any]:
            array = np.asarray(x)
            extra = array.ndim - len(space.shape)
            if extra not in (0, 1) or array.shape[extra:] != space.shape:
                raise ValueError(
                    f"An observation of shape {space.shape}, or a batch [N, ...] of them, was expected; got shape {array.shape}."
                )
            leading.add(array.shape[:extra])
            cast = array.astype(observation_dtype(space))
            if cast.dtype.kind != "f" and not np.array_equal(cast, array):
                raise ValueError(f"The observation has {array.dtype} values that the space {space} cannot hold.")
            return cast

        try:
            checked = map_leaves(leaf, self.observation_space, obs)
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"The observation does not fit {self.observation_space}: {error!r}.") from error
        if len(leading) != 1:
            raise ValueError("The entries of the observation are not all single, or all batches of one length.")
        return checked, leading.pop()

    def _checked_mask(self, action_mask: Any, leading: tuple[int, ...]) -> np.ndarray[Any, Any]:
        sizes = choices(self.action_space)
        if sizes is None:
            raise ValueError(f"An action mask is for discrete actions, and the space is {self.action_space}.")
        mask, shape = np.asarray(action_mask, bool), (*leading, sum(sizes))
        if mask.shape != shape:
            raise ValueError(f"An action mask of shape {shape} was expected; got shape {mask.shape}.")
        if not np.logical_or.reduceat(mask, np.cumsum((0, *sizes[:-1])), axis=-1).all():
            raise ValueError("There is no legal action: the action mask is all false, or is for one of the choices.")
        return mask

    def save(self, path: str | Path) -> Path:
        """Write the policy to one file that `surefoot.load` reads."""
        return save_file(Path(path), self.acting, describe(self.config, self.spec))


@partial(jax.jit, static_argnums=0)
def _act(config: Any, acting: PyTree, obs: Observation, action_mask: Any, carry: PyTree, key: jax.Array | None) -> Any:
    """Compiled once for all policies of one configuration, such as those that a run's reports hold."""
    return of(config).act(config, acting, obs, action_mask, carry, key)


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
        **({} if spec.settings is None else {"environment_settings": spec.settings}),
    }


def undescribe(info: dict[str, Any]) -> tuple[Algorithm, Any, EnvironmentSpec]:
    """What `describe` described; CheckpointError where it does not make sense."""
    try:
        algorithm = named(info["algorithm"])
        config = algorithm.config(**info["config"])
        spaces = from_json(info["observation_space"]), from_json(info["action_space"])
        validate(*spaces)
        given = str(info["environment"]), *spaces, int(info["num_envs"]), bool(info["has_action_mask"])
        return algorithm, config, EnvironmentSpec(*given, settings=info.get("environment_settings"))
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
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
    if not path.exists():
        raise CheckpointError(f"{path} is not there: give a run that has saved a policy, or a policy's file.")
    arrays, info = read_file(path)
    algorithm, config, spec = undescribe(info)
    if (name := own_network(config)) is not None:
        if network is not None:
            register(name, network)
        try:
            find_factory(name, import_module=False)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
    try:
        template = jax.eval_shape(partial(algorithm.init, config, spec), jax.random.key(0)).acting
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path} describes a policy that cannot be built: {error}") from error
    return Policy(config, spec, restore_tree(arrays, template, source=str(path)))
