"""Gymnasium spaces: what the learner can do, the way from its units to the environment's, arrays and JSON for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Space

from .types import Array, Observation

_MAX_SIZE = 2**28  # numbers in one array of a space that is read from a file: a hostile one must not fill the memory


def validate(observation_space: Space[Any], action_space: Space[Any]) -> None:
    """Raise a ValueError that says what to change where the spaces are beyond what a policy here can see or do."""
    map_leaves(_validate_observation, observation_space)
    if encoded_size(encoder(observation_space)) < 1:
        raise ValueError(f"The observation space {observation_space} is empty; a policy needs at least one number to see.")
    if isinstance(action_space, (Discrete, MultiDiscrete, MultiBinary)):
        if min(choices(action_space) or (), default=0) < 1:
            raise ValueError(f"The action space {action_space} is empty; every choice needs at least one action.")
    elif isinstance(action_space, Box):
        if not np.issubdtype(action_space.dtype, np.floating):
            raise ValueError(
                f"The action space {action_space} holds integers; declare it MultiDiscrete, or a float Box and round in the environment."
            )
        if action_space.shape is None or int(np.prod(action_space.shape)) < 1:
            raise ValueError(f"The action space {action_space} is empty; a Box needs at least one number.")
        with np.errstate(over="ignore"):  # bounds of the size of the largest float are no bounds: their range is infinite
            is_bounded = np.isfinite(action_space.high - action_space.low).all()
        if not is_bounded:
            raise ValueError(
                f"The action space {action_space} is unbounded; give it finite bounds, for example with "
                "gymnasium.wrappers.RescaleAction or by declaring Box(low=-1, high=1, ...) and scaling in the environment."
            )
        if (action_space.low >= action_space.high).any():
            raise ValueError(f"The action space {action_space} has a lower bound that is not below its upper bound; mend low and high.")
    else:
        raise ValueError(f"The action space {action_space} is not supported; use Discrete, MultiDiscrete, MultiBinary or a bounded Box.")


def _validate_observation(space: Space[Any]) -> None:
    if not isinstance(space, (Box, Discrete, MultiDiscrete, MultiBinary)):
        raise ValueError(
            f"The observation space {space} is not supported; use Box, Discrete, MultiDiscrete, MultiBinary or a Dict of them."
        )
    if isinstance(space, Box) and (space.low > space.high).any():
        raise ValueError(f"The observation space {space} has low > high; mend its bounds.")


def map_leaves(function: Callable[..., Any], space: Space[Any], *trees: Any) -> Any:
    """`function(leaf_space, *leaves)` at every leaf of a (nested) Dict space, as a dictionary of the same shape."""
    if isinstance(space, Dict):
        return {key: map_leaves(function, sub, *(tree[key] for tree in trees)) for key, sub in space.spaces.items()}
    return function(space, *trees)


def observation_dtype(space: Space[Any]) -> np.dtype[Any]:
    """The dtype in which a leaf's observations are kept: float32 for floats, the space's own for small integers, else int32."""
    dtype = np.dtype(space.dtype)
    if np.issubdtype(dtype, np.floating):
        return np.dtype(np.float32)
    return dtype if dtype.itemsize <= 4 else np.dtype(np.int32)


def zeros(space: Space[Any], *leading: int) -> Observation:
    """NumPy buffers for observations of `space` with the given leading axes."""
    return map_leaves(lambda leaf: np.zeros((*leading, *leaf.shape), observation_dtype(leaf)), space)


def choices(space: Space[Any]) -> tuple[int, ...] | None:
    """Among how many actions each part of a discrete action is chosen; None for a Box."""
    if isinstance(space, Discrete):
        return (int(space.n),)
    if isinstance(space, MultiDiscrete):
        return tuple(int(n) for n in space.nvec.flat)
    return (2,) * int(np.prod(space.shape)) if isinstance(space, MultiBinary) else None


def action_size(space: Space[Any]) -> int:
    """How many numbers a policy puts out for one action: a logit for every choice that can be made, or the means of a Box."""
    sizes = choices(space)
    return int(np.prod(space.shape)) if sizes is None else sum(sizes)


def zero_actions(space: Space[Any], *leading: int) -> Array:
    """Actions in the policy's units, all 0: [...] for a Discrete space, [..., A] otherwise."""
    sizes = choices(space)
    if isinstance(space, Discrete):
        return jnp.zeros(leading, jnp.int32)
    return jnp.zeros((*leading, action_size(space))) if sizes is None else jnp.zeros((*leading, len(sizes)), jnp.int32)


def uniform_choice(key: jax.Array, shape: tuple[int, int], action_mask: Array | None) -> jax.Array:
    """For each of N rows one of A actions, `shape` being (N, A), all legal ones equally likely."""
    if action_mask is None:
        return jax.random.randint(key, shape[:1], 0, shape[1], jnp.int32)
    return jnp.argmax(jnp.where(action_mask, jax.random.uniform(key, shape), -1.0), axis=-1).astype(jnp.int32)


def to_environment(space: Space[Any], action: Array) -> Array:
    """Actions in the policy's units [..., A] or [...] as the space has them; NumPy in, NumPy out.

    A discrete policy counts from 0; a Box policy's [-1, 1] spans [low, high], and what lies outside is clipped to it.
    """
    is_host = isinstance(action, np.ndarray)
    xp, dtype = (np, space.dtype) if is_host else (jnp, jax.dtypes.canonicalize_dtype(space.dtype))
    if isinstance(space, Discrete):
        return action if space.start == 0 else action + xp.asarray(space.start, action.dtype)
    if isinstance(space, (MultiDiscrete, MultiBinary)):
        shaped = action.reshape((*action.shape[:-1], *space.shape))
        start = getattr(space, "start", np.zeros(()))
        return (shaped + xp.asarray(start, action.dtype) if np.any(start) else shaped).astype(dtype)
    from_low = action.reshape((*action.shape[:-1], *space.shape)) + 1.0
    # Clipped here and not before: rounding would take the ends of some intervals a little beyond themselves.
    scaled = xp.minimum(xp.maximum(space.low + from_low * ((space.high - space.low) / 2.0), space.low), space.high)
    return scaled.astype(dtype)


def encoder(space: Space[Any]) -> tuple[Any, ...]:
    """A hashable plan for `encode`: how each leaf becomes numbers."""
    if isinstance(space, Dict):
        return ("dict", tuple((key, encoder(sub)) for key, sub in space.spaces.items()))
    if isinstance(space, Discrete):
        return ("one_hot", (int(space.n),), int(space.start))
    if isinstance(space, MultiDiscrete):
        return ("one_hot", tuple(int(n) for n in space.nvec.flat), tuple(int(s) for s in np.ravel(space.start)))
    image = isinstance(space, Box) and space.dtype == np.uint8
    return ("scale", int(np.prod(space.shape)), 255.0) if image else ("float", int(np.prod(space.shape)))


def encode(plan: tuple[Any, ...], obs: Observation) -> jnp.ndarray:
    """One observation as a flat float32 vector: one-hot for categories, bytes divided by 255, dictionaries in the order of the space."""
    if plan[0] == "dict":
        return jnp.concatenate([encode(sub, obs[key]) for key, sub in plan[1]])
    if plan[0] == "one_hot":
        index = jnp.ravel(obs) - jnp.ravel(jnp.asarray(plan[2]))
        return jnp.concatenate([jnp.arange(n) == index[i] for i, n in enumerate(plan[1])]).astype(jnp.float32)
    x = jnp.ravel(obs).astype(jnp.float32)
    return x / plan[2] if plan[0] == "scale" else x


def encoded_size(plan: tuple[Any, ...]) -> int:
    """The length of what `encode` gives."""
    if plan[0] == "dict":
        return sum(encoded_size(sub) for _, sub in plan[1])
    return sum(plan[1]) if plan[0] == "one_hot" else plan[1]


def to_json(space: Space[Any]) -> dict[str, Any]:
    """The space as plain JSON, infinite bounds as strings."""
    if isinstance(space, Dict):
        return {"type": "Dict", "spaces": {key: to_json(sub) for key, sub in space.spaces.items()}}
    if isinstance(space, Discrete):
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start)}
    if isinstance(space, MultiDiscrete):
        return {"type": "MultiDiscrete", "nvec": space.nvec.tolist(), "start": space.start.tolist(), "dtype": str(space.dtype)}
    if isinstance(space, MultiBinary):
        return {"type": "MultiBinary", "shape": list(space.shape)}
    assert isinstance(space, Box)
    bounds = {end: [str(+x) for x in getattr(space, end).ravel().tolist()] for end in ("low", "high")}
    if all(len(set(values)) == 1 for values in bounds.values()):  # an image would list thousands of equal numbers
        bounds = {end: values[:1] for end, values in bounds.items()}
    return {"type": "Box", **bounds, "shape": list(space.shape), "dtype": str(space.dtype)}


def from_json(data: dict[str, Any]) -> Space[Any]:
    """The space that `to_json` wrote; ValueError on anything else."""
    try:
        kind = data["type"]
        if kind == "Dict":
            return Dict([(key, from_json(sub)) for key, sub in data["spaces"].items()])  # pairs keep their order; a dict is sorted
        if kind == "Discrete":
            return Discrete(int(data["n"]), start=int(data["start"]))
        if kind == "MultiDiscrete":
            return MultiDiscrete(np.array(data["nvec"]), np.dtype(str(data["dtype"])).type, start=np.array(data["start"]))
        if kind == "MultiBinary":
            return MultiBinary(_shape(data))
        if kind == "Box":
            shape, dtype = _shape(data), np.dtype(str(data["dtype"]))
            number = float if dtype.kind == "f" else int
            low, high = (
                np.broadcast_to(np.array([number(x) for x in data[end]], dtype), math.prod(shape)).reshape(shape) for end in ("low", "high")
            )
            return Box(low, high, shape, dtype.type)
    except (KeyError, TypeError, AttributeError, AssertionError, OverflowError, RecursionError) as error:
        raise ValueError(f"not a space: {type(error).__name__}: {error}") from error
    raise ValueError(f"unknown kind of space: {kind!r}")


def _shape(data: dict[str, Any]) -> tuple[int, ...]:
    shape = tuple(int(n) for n in data["shape"])
    if math.prod(shape) > _MAX_SIZE:
        raise ValueError(f"a space of shape {shape} is too large")
    return shape
