"""What crosses from an environment's code into the learner: copied into preallocated rows, and refused where it is not sound.

Every row is looked at before it is handed on, so that nothing non-finite, misshapen or mistyped reaches a return, a
normaliser or a loss. Whole buffers are checked at once; what is done for each environment is a few type comparisons.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any, Literal, NoReturn

import gymnasium
import numpy as np
from gymnasium import spaces

from ..spaces import choices, observation_dtype
from ..types import EnvironmentSpec, Observation, Step

NUM_RANGE_CHECKS = 100  # vector steps whose observations are compared with the bounds of their space

PROBE_SEED = 0  # of the resets in a constructor; `reset` starts afresh

# What the inner loop stores without a further look.
REWARD_TYPES = frozenset({float, int, np.float64, np.float32, np.float16, np.int64, np.int32})
FLAG_TYPES = frozenset({bool, np.bool_})
_INTEGER_TYPES = frozenset({int, np.int64, np.int32})
_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))

OLD_GYM = (
    "this is the API of old Gym. Port it to Gymnasium: reset(seed=None, options=None) -> (observation, info) and "
    "step(action) -> (observation, reward, terminated, truncated, info), where terminated means that the task is over and "
    "truncated that a time limit cut it; or wrap it with shimmy.GymV21CompatibilityV0"
)


class EnvironmentFault(ValueError):
    """An environment did what cannot be learned from; the message names the environment, its seed, the step and the cause."""

    def __init__(self, problem: str, index: int | None = None):
        super().__init__(problem)
        self.index = index  # of the environment, where it is known


class EnvironmentWarning(UserWarning):
    """An environment does what can be learned from, but is likely not meant."""


def all_finite(array: np.ndarray[Any, Any]) -> bool:
    """`np.isfinite(array).all()` in half the time, for the small arrays of every step."""
    return bool(np.count_nonzero(np.isfinite(array)) == array.size)


class Leaf:
    """One array of the observation of N streams: its rows [N, ...] and what may be written into them."""

    def __init__(self, path: str, space: spaces.Space[Any], num_envs: int):
        assert space.shape is not None
        self.name = f"observation {path!r}" if path else "observation"
        self.space, self.shape = space, space.shape
        self.rows = np.zeros((num_envs, *self.shape), observation_dtype(space))
        # Float64 to float32 is the norm and passes in silence; an int64 is looked at before it becomes an int32.
        self.plain = _FLOATS if self.rows.dtype.kind == "f" else (self.rows.dtype,)
        self.is_count = isinstance(space, spaces.Discrete)
        self.low, self.high = _bounds(space, self.rows.dtype)
        self.has_warned = False

    def write(self, index: int, value: Any) -> None:
        """Row `index` becomes `value`."""
        kind = type(value)
        if kind is np.ndarray and value.dtype in self.plain and value.shape == self.shape:
            self.rows[index] = value
        elif self.is_count and kind in _INTEGER_TYPES:
            self.rows[index] = int(value)
        else:
            self.rows[index] = self._converted(value, self.shape)

    def write_all(self, values: Any) -> None:
        """All rows become `values` [N, ...]."""
        if type(values) is np.ndarray and values.dtype in self.plain and values.shape == self.rows.shape:
            self.rows[...] = values
        else:
            self.rows[...] = self._converted(values, self.rows.shape)

    def _converted(self, value: Any, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise EnvironmentFault(f"the {self.name} is {describe(value)}; its space {self.space} wants numbers")
        if array.shape != shape:
            raise EnvironmentFault(f"the {self.name} has shape {array.shape}, but its space says {shape}")
        with np.errstate(over="ignore", invalid="ignore"):  # an overflow is found as an infinity, a lost value below
            cast = array.astype(self.rows.dtype)
        if cast.dtype.kind != "f" and not np.array_equal(cast, array):
            raise EnvironmentFault(
                f"the {self.name} has {array.dtype} values that {cast.dtype} cannot hold; return {self.space.dtype}, or declare a float Box"
            )
        if not self.has_warned and not self._is_expected(array.dtype, is_array=isinstance(value, np.ndarray)):
            self.has_warned = True
            warn(f"the {self.name} has dtype {array.dtype}, but its space says {self.space.dtype}; it is cast at every step")
        return cast

    def _is_expected(self, dtype: np.dtype[Any], is_array: bool) -> bool:
        declared = np.dtype(self.space.dtype)
        if dtype == declared or dtype.kind == declared.kind == "f":
            return True
        # A Python integer has no width, and a category is the same in any.
        return dtype.kind in "biu" and declared.kind in "iu" and (self.is_count or not is_array)

    def find_non_finite(self) -> tuple[int, str] | None:
        """The first row with a NaN or an infinity, and a sentence about it."""
        if self.rows.dtype.kind != "f" or all_finite(self.rows):
            return None
        index, *component = (int(i) for i in np.argwhere(~np.isfinite(self.rows))[0])
        at = f" at {component}" if component else ""
        return index, f"the {self.name} is {self.rows[(index, *component)]}{at}"

    def find_outside(self) -> tuple[int, str] | None:
        """The first row outside the space's bounds, and a sentence about it."""
        outside = (self.rows < self.low) | (self.rows > self.high)
        if not outside.any():
            return None
        index, *component = (int(i) for i in np.argwhere(outside)[0])
        low, high = self.low[tuple(component)], self.high[tuple(component)]
        at = f" at {component}" if component else ""
        return index, f"the {self.name} is {self.rows[(index, *component)]}{at}, outside its space's [{low}, {high}]"


def _bounds(space: spaces.Space[Any], dtype: np.dtype[Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    if isinstance(space, spaces.Discrete):
        low, high = np.array(space.start), np.array(space.start + space.n - 1)
    elif isinstance(space, spaces.MultiDiscrete):
        low, high = space.start, space.start + space.nvec - 1
    elif isinstance(space, spaces.MultiBinary):
        low, high = np.zeros(space.shape), np.ones(space.shape)
    else:
        assert isinstance(space, spaces.Box)
        low, high = space.low, space.high
    if dtype.kind == "f":  # rounded as the rows are, so that a value at its bound stays inside
        with np.errstate(over="ignore"):
            return low.astype(dtype), high.astype(dtype)
    return low, high


class ObservationRows:
    """Preallocated observations of N streams, in the shape of the space: one array, or (nested) dictionaries of arrays."""

    def __init__(self, space: spaces.Space[Any], num_envs: int):
        """`space` is the environment's own; a Tuple in it becomes a dictionary with the keys "0", "1", ..."""
        self.leaves: list[Leaf] = []
        self._tree = self._build("", space, num_envs)
        self.arrays: Observation = _arrays(self._tree)
        # The common case, a single array, is written without walking a tree.
        self.write: Callable[[int, Any], None] = self._tree.write if isinstance(self._tree, Leaf) else self._write_row

    def _build(self, path: str, space: spaces.Space[Any], num_envs: int) -> Any:
        if isinstance(space, (spaces.Dict, spaces.Tuple)):
            parts = space.spaces.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces)
            return {key: self._build(f"{path}/{key}".lstrip("/"), part, num_envs) for key, part in parts}
        self.leaves.append(Leaf(path, space, num_envs))
        return self.leaves[-1]

    def _write_row(self, index: int, obs: Any) -> None:
        _walk(self._tree, obs, lambda leaf, value: leaf.write(index, value))

    def write_all(self, obs: Any) -> None:
        """All rows become the batched observation `obs`."""
        _walk(self._tree, obs, Leaf.write_all)

    def row(self, index: int) -> list[np.ndarray[Any, Any]]:
        """A copy of every leaf of one row."""
        return [leaf.rows[index].copy() for leaf in self.leaves]

    def copy_rows(self, source: ObservationRows, rows: int | np.ndarray[Any, Any]) -> None:
        """Row number `rows`, or the rows where `rows` [N] is true, become those of `source`."""
        for leaf, other in zip(self.leaves, source.leaves, strict=True):
            leaf.rows[rows] = other.rows[rows]


def _walk(tree: Any, obs: Any, write: Callable[[Leaf, Any], None]) -> None:
    if isinstance(tree, Leaf):
        write(tree, obs)
        return
    for key, branch in tree.items():
        try:
            part = obs[key]
        except (KeyError, IndexError, TypeError):
            raise EnvironmentFault(f"the observation lacks {key!r}; it is {describe(obs)}") from None
        _walk(branch, part, write)


def _arrays(tree: Any) -> Observation:
    return tree.rows if isinstance(tree, Leaf) else {str(key): _arrays(branch) for key, branch in tree.items()}


def without_tuples(space: spaces.Space[Any]) -> spaces.Space[Any]:
    """`space` with every Tuple as a Dict whose keys are "0", "1", ...: the shape in which its observations are kept."""
    if isinstance(space, spaces.Tuple):
        return spaces.Dict({str(i): without_tuples(part) for i, part in enumerate(space.spaces)})
    if isinstance(space, spaces.Dict):
        return spaces.Dict({key: without_tuples(part) for key, part in space.spaces.items()})
    return space


class MaskRows:
    """Preallocated action masks [N, A] of N streams, those of the parts of an action one after another."""

    def __init__(self, action_space: spaces.Space[Any], num_envs: int):
        sizes = choices(action_space)
        assert sizes is not None
        self.rows = np.ones((num_envs, sum(sizes)), bool)
        self._begins = np.cumsum((0, *sizes[:-1]))  # of each part

    def write(self, index: int, mask: Any, has_future: bool = True) -> None:
        """Row `index` becomes `mask`. Where the state has no future it may be absent or empty, and allows everything.

        It is one array of 0s and 1s, or one for each part of the action.
        """
        if mask is None and has_future:
            raise EnvironmentFault("the action mask is missing; reset and every step must give it once one of them has", index)
        array = self.rows[index] | True if mask is None else joined(mask)
        if array.dtype.kind not in "biu" or array.shape != self.rows.shape[1:]:
            raise EnvironmentFault(
                f"the action mask is {describe(mask)}; expected {self.rows.shape[1]} entries, 1 for a legal action and 0 for another",
                index,
            )
        is_empty = not np.logical_or.reduceat(array, self._begins).all()
        if is_empty and has_future:
            raise EnvironmentFault("no legal action: the action mask is all zeros", index)
        self.rows[index] = True if is_empty else array


def joined(mask: Any) -> np.ndarray[Any, Any]:
    """An action mask in one piece, where it has one for each part of the action."""
    is_divided = isinstance(mask, (tuple, list)) and all(isinstance(part, np.ndarray) for part in mask)
    return np.concatenate([part.ravel() for part in mask]) if is_divided and mask else np.asarray(mask)


def checked_reward(reward: Any) -> Any:
    """`reward` where it is one real number; called only for types that are not plainly so."""
    array = np.asarray(reward)
    if array.shape == () and array.dtype.kind in "biuf":
        return array
    raise EnvironmentFault(f"the reward is {describe(reward)}; return one float")


def checked_flag(name: str, flag: Any) -> bool:
    """`flag` where it is one truth value; called only for types that are not plainly so."""
    if isinstance(flag, (int, np.integer, np.ndarray)) and np.shape(flag) == () and flag in (0, 1):
        return bool(flag)
    raise EnvironmentFault(f"{name} is {describe(flag)}; return True or False")


class Boundary:
    """The rows of N streams, and everything that is checked before they are handed on as a `Step`."""

    def __init__(
        self,
        name: str,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        num_envs: int,
        has_action_mask: bool,
        close: Callable[[], None],
    ):
        """`observation_space` is the environment's own, less an action mask; `close` is called before a fault is raised."""
        self.name, self.action_space, self.num_envs, self._close = name, action_space, num_envs, close
        self.observation_space = without_tuples(observation_space)
        self.obs, self.final_obs = ObservationRows(observation_space, num_envs), ObservationRows(observation_space, num_envs)
        self.reward = np.zeros(num_envs, np.float32)
        self.terminated, self.truncated = np.zeros(num_envs, bool), np.zeros(num_envs, bool)
        self.valid = np.ones(num_envs, bool)
        self.mask = MaskRows(action_space, num_envs) if has_action_mask else None
        self.final_mask = MaskRows(action_space, num_envs) if has_action_mask else None
        mask, final_mask = (None if rows is None else rows.rows for rows in (self.mask, self.final_mask))
        # What `step` answers: the rows as they stand.
        self.step = Step(self.obs.arrays, self.reward, self.terminated, self.truncated, self.final_obs.arrays, self.valid, mask, final_mask)
        self.seeds: list[int] = []
        self.num_steps = 0
        self._range_checks_left = NUM_RANGE_CHECKS

    def fail(self, index: int | None, problem: str, cause: BaseException | None = None) -> NoReturn:
        """Close the environments and raise the fault with its place."""
        with contextlib.suppress(Exception):
            self._close()
        seed = f" (seed {self.seeds[index]})" if index is not None and self.seeds else ""
        where = f"environment {index}{seed}" if index is not None else "one of its environments"
        raise EnvironmentFault(f"{self.name}: {where}, step {self.num_steps}: {problem}.", index) from cause

    def fail_with(self, index: int | None, error: Exception) -> NoReturn:
        """Raise what went wrong in or around an environment's own code as a fault with its place."""
        if isinstance(error, EnvironmentFault):
            self.fail(error.index if index is None else index, str(error), error.__cause__)
        self.fail(index, problem_of(error), error)

    def actions(self, action: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """`action` [N, ...] as the space's dtype, in memory that an environment may keep."""
        assert self.action_space.shape is not None
        actions = np.array(action, dtype=self.action_space.dtype)
        if actions.shape != (self.num_envs, *self.action_space.shape):
            raise ValueError(f"{self.name}: the actions have shape {actions.shape}, expected {(self.num_envs, *self.action_space.shape)}.")
        if actions.dtype.kind == "f" and not all_finite(actions):
            index = int(np.argwhere(~np.isfinite(actions))[0][0])
            self.fail(index, f"the policy gave the action {actions[index]}")
        return actions

    def begin(self, seeds: list[int]) -> None:
        """Every stream starts anew; `seeds` is empty where the environments get no seed of their own."""
        self.seeds, self.num_steps = seeds, 0

    def write_outcome(self, reward: Any, terminated: Any, truncated: Any) -> None:
        """Store the batched answer of a vector environment; every row of it is valid."""
        for name, values, rows, kinds in (
            ("reward", reward, self.reward, "biuf"),
            ("terminated", terminated, self.terminated, "b"),
            ("truncated", truncated, self.truncated, "b"),
        ):
            array = np.asarray(values)
            if array.shape != rows.shape or array.dtype.kind not in kinds:
                raise EnvironmentFault(f"{name} is {describe(values)}; expected {rows.dtype} [{self.num_envs}]")
            rows[:] = array
        self.valid[:] = True

    def invalidate(self, rows: np.ndarray[Any, Any]) -> None:
        """No action was taken in `rows` [N]: no reward, no end."""
        self.valid[rows] = False
        self.reward[rows] = 0.0
        self.terminated[rows] = self.truncated[rows] = False

    def keep_final(self, rows: int | np.ndarray[Any, Any]) -> None:
        """What stands in `rows` (a number, or [N] bool) is the last of its episode; a new one is about to be written over it."""
        self.final_obs.copy_rows(self.obs, rows)
        if self.mask is not None and self.final_mask is not None:
            self.final_mask.rows[rows] = self.mask.rows[rows]

    def check(self, has_ended: bool) -> None:
        """Refuse rows that are not finite; warn, once, of an observation outside its space."""
        if not all_finite(self.reward):
            index = int(np.flatnonzero(~np.isfinite(self.reward))[0])
            self.fail(index, f"the reward is {self.reward[index]} as float32")
        for rows in (self.obs, self.final_obs) if has_ended else (self.obs,):
            for leaf in rows.leaves:
                if (found := leaf.find_non_finite()) is not None:
                    self.fail(*found)
        if self._range_checks_left:
            self._range_checks_left -= 1
            for leaf in self.obs.leaves:
                if (found := leaf.find_outside()) is not None:
                    self._range_checks_left = 0
                    warn(f"{self.name}: environment {found[0]}, step {self.num_steps}: {found[1]}. Declare the bounds that hold.")
                    break

    def first(self) -> tuple[Observation, np.ndarray[Any, Any] | None]:
        """What `reset` answers: the rows as they stand."""
        return self.obs.arrays, None if self.mask is None else self.mask.rows

    def spec(self, resume: Literal["exact", "episodes restart"]) -> EnvironmentSpec:
        """What a learner must know of these streams."""
        return EnvironmentSpec(
            name=self.name,
            observation_space=self.observation_space,
            action_space=self.action_space,
            num_envs=self.num_envs,
            has_action_mask=self.mask is not None,
            resume=resume,
        )


def problem_of(error: Exception) -> str:
    """A sentence about an exception that came out of an environment's code or of this module."""
    if isinstance(error, EnvironmentFault):
        return str(error)
    # A wrapper unpacks before this module can count.
    if isinstance(error, ValueError) and "expected 5, got 4" in str(error):
        return f"step returned 4 values; {OLD_GYM}"
    if isinstance(error, TypeError) and "unexpected keyword argument 'seed'" in str(error):
        return f"reset does not take a seed; {OLD_GYM}"
    return f"it raised {type(error).__name__}: {error}"


def describe(value: Any) -> str:
    """The type of `value`, and its shape or what it holds."""
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} with shape {value.shape}"
    if isinstance(value, dict):
        return f"a dictionary with the keys {sorted(map(str, value))}"
    return "None" if value is None else f"a {type(value).__name__}, {value!r:.60}"


def warn(sentence: str) -> None:
    """Issue an `EnvironmentWarning`."""
    warnings.warn(sentence, EnvironmentWarning, stacklevel=4)


def stream_seeds(seed: int, num_envs: int) -> list[int]:
    """The first seed of each of N streams; those of fewer streams are the first of these."""
    return [int(word) for word in np.random.SeedSequence(seed).generate_state(num_envs)]


def first_reset(env: Any, name: str) -> tuple[Any, dict[str, Any]]:
    """(observation, info) of the reset that shows what the spaces do not say: whether there are action masks."""
    try:
        return reset_result(env.reset(seed=PROBE_SEED))
    except Exception as error:
        cause = error.__cause__ if isinstance(error, EnvironmentFault) else error
        raise EnvironmentFault(f"{name}: first reset: {problem_of(error)}.") from cause


def reset_result(result: Any) -> tuple[Any, dict[str, Any]]:
    """(observation, info) that `reset` returned."""
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
        raise EnvironmentFault(f"reset returned {describe(result)} where (observation, info) was expected; {OLD_GYM}")
    return result


def step_result(result: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
    """(observation, reward, terminated, truncated, info) that `step` returned."""
    if not (isinstance(result, tuple) and len(result) == 5):
        count = f"{len(result)} values" if isinstance(result, tuple) else describe(result)
        raise EnvironmentFault(f"step returned {count}; {OLD_GYM}")
    return result


def split_mask(
    observation_space: spaces.Space[Any], action_space: spaces.Space[Any], obs: Any, info: dict[str, Any]
) -> tuple[spaces.Space[Any], str | None]:
    """(observation space less the mask, where the mask is found: "obs", "info" or None) from one answer of `reset`."""
    if choices(action_space) is None:
        if info.get("action_mask") is not None:
            warn(f"info['action_mask'] is ignored: masks are for discrete actions, and the space is {action_space}")
        return observation_space, None
    if isinstance(observation_space, spaces.Dict) and "action_mask" in observation_space.spaces:
        rest = {key: part for key, part in observation_space.spaces.items() if key != "action_mask"}
        if not rest:
            raise ValueError(f"The observation space {observation_space} holds nothing but the action mask; add what the policy shall see.")
        return gymnasium.spaces.Dict(rest), "obs"
    return observation_space, "info" if info.get("action_mask") is not None else None
