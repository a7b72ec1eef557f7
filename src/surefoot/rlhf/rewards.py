"""Rewards that are Python functions: `def score(prompts, completions, **columns) -> list[float | None]`.

A function is named `module:function` or `file.py:function`, a weight follows an equals sign. It receives a list for each name: prompts
as the data has them (text, or chat messages), completions as text, every further column of the data. None says that a completion
cannot be scored; it is then left out of learning, which is not a score of 0. Functions run with the rights of the user, and a resumed
run goes on with the same bits only if they answer the same question in the same way.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import math
import numbers
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from ..config import nearest
from .data import Text

EXCERPT = 200  # characters of a text that an error quotes

Floats = np.ndarray[Any, np.dtype[np.float32]]


class RewardFault(ValueError):
    """A reward function did what cannot be learned from; the message names the function, the sample and the cause."""


class TooSlow(Exception):
    """A call has not come back in time."""


class Reward(NamedTuple):
    """A reward function, and the arguments that it takes."""

    name: str  # as the user named it
    function: Callable[..., Any]
    arguments: frozenset[str] | None  # None: all
    weight: float = 1.0


class Scores(NamedTuple):
    """What B completions are worth."""

    score: Floats  # [B] the weighted sum; 0 where `is_scored` is false
    is_scored: np.ndarray[Any, np.dtype[np.bool_]]  # [B] every function gave a number
    parts: dict[str, Floats]  # [B] what each function said, unweighted; NaN where it gave None


def parse_weighted(text: str) -> tuple[str, float]:
    """("a.py:score", 0.5) from "a.py:score=0.5"; the weight is 1 where none is given. The same for the directory of a reward model."""
    source, equals, number = text.rpartition("=")
    if not equals or Path(text).exists():
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        if not is_function(source):
            return text, 1.0  # a path with an equals sign in it
        weight = math.nan
    if not math.isfinite(weight) or weight == 0:
        raise ValueError(f"The weight of the reward {text!r} is {number!r}; give a number other than 0, as in {source}=0.5.")
    return source, weight


def is_function(source: str) -> bool:
    """Does `source` name a function, rather than the directory of a reward model?"""
    return ":" in source and not Path(source).exists()


def load_rewards(specifications: Sequence[str], columns: Iterable[str] = ()) -> list[Reward]:
    """The functions that are named, with their weights, if the data's `columns` are all they ask for. Runs the code of their modules."""
    columns = list(columns)
    rewards: list[Reward] = []
    for source, weight in map(parse_weighted, specifications):
        if source in (reward.name for reward in rewards):
            raise ValueError(f"The reward {source!r} is given twice; give it once, with the sum of its weights.")
        function = find_function(source)
        rewards.append(Reward(source, function, _arguments(source, function, columns), weight))
    return rewards


def score(
    rewards: Sequence[Reward],
    prompts: Sequence[Text],
    completions: Sequence[str],
    columns: Sequence[Mapping[str, Any]],
    *,
    timeout_seconds: float | None = None,
) -> Scores:
    """What each function says of B completions, and the weighted sum; a `RewardFault` with the sample where one cannot be learned from.

    With a time limit each function is called in a thread of its own, which is left behind if it does not come back.
    """
    assert len(prompts) == len(completions) == len(columns), (len(prompts), len(completions), len(columns))
    if not completions:
        return Scores(np.zeros(0, np.float32), np.zeros(0, np.bool_), {reward.name: np.zeros(0, np.float32) for reward in rewards})
    given: dict[str, list[Any]] = {"prompts": list(prompts), "completions": list(completions)}
    given |= {name: [row[name] for row in columns] for name in columns[0]}
    parts = {reward.name: _scores(reward, given, timeout_seconds) for reward in rewards}
    total = sum(reward.weight * parts[reward.name].astype(np.float64) for reward in rewards) + np.zeros(len(completions))
    is_scored = ~np.isnan(total)
    if np.abs(total, where=is_scored, out=np.zeros_like(total)).max() > np.finfo(np.float32).max:
        raise RewardFault("The weighted sum of the rewards is beyond what a float32 holds; lower their weights.")
    return Scores(np.where(is_scored, total, 0.0).astype(np.float32), is_scored, parts)


# Finding a function.


def find_function(source: str) -> Callable[..., Any]:
    """The function called `module:function` or `file.py:function`. Runs the code of the module."""
    place, colon, name = source.rpartition(":")
    if not (place and colon and name):
        raise ValueError(f"The reward {source!r} is no function; name it as module:function or file.py:function.")
    module = _import_file(source, Path(place)) if place.endswith(".py") else _import(source, place)
    function = getattr(module, name, None)
    if not callable(function):
        known = [other for other, value in vars(module).items() if callable(value) and not other.startswith("_")]
        raise ValueError(f"The reward {source!r}: there is no function {name!r} in {place}{nearest(name, known)}")
    return function  # type: ignore[no-any-return]


def _import_file(source: str, path: Path) -> Any:
    """The module in a file; its directory is searched for what it imports, as Python does for a script."""
    path = path.expanduser().resolve()
    if not path.is_file():
        known = [other.name for other in path.parent.glob("*.py")]
        raise ValueError(f"The reward {source!r}: there is no file {str(path)!r}{nearest(path.name, known)}")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    importlib.invalidate_caches()  # the file may be newer than what Python remembers of its directory
    module = _import(source, path.stem)
    found = getattr(module, "__file__", None)
    if found is None or Path(found).resolve() != path:
        raise ValueError(f"The reward {source!r}: Python knows another module {path.stem!r} ({found or 'built in'}); rename the file.")
    return module


def _import(source: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"The reward {source!r}: {error}; it must be a module that Python can import from here, or a file.") from error
    except (Exception, SystemExit) as error:
        raise RewardFault(f"The reward {source!r}: importing it raised {type(error).__name__}: {error}.") from error


def _arguments(source: str, function: Callable[..., Any], columns: list[str]) -> frozenset[str] | None:
    """Which of the names that a call offers a function takes, None being all; ValueError where it needs one that there is not."""
    offered = ["prompts", "completions", *columns]
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C
        return None
    for parameter in parameters:
        is_needed = parameter.default is parameter.empty and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if is_needed and (parameter.name not in offered or parameter.kind is parameter.POSITIONAL_ONLY):
            raise ValueError(
                f"The reward {source!r} asks for {parameter.name!r}{nearest(parameter.name, offered)} A call names its arguments; there "
                f"are {', '.join(offered)}: def score(prompts, completions, **columns)."
            )
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return None if takes_all else frozenset(parameter.name for parameter in parameters)


# Calling it.


def _scores(reward: Reward, given: dict[str, list[Any]], timeout_seconds: float | None) -> Floats:
    """One function's scores [B], NaN for None."""
    num = len(given["completions"])
    try:
        answer = _call(reward, given, timeout_seconds)
    except TooSlow:
        raise RewardFault(
            f"The reward {reward.name!r} took more than the {timeout_seconds:g} seconds that it has for {num} completions; make it faster, "
            "give what it waits for a limit of its own and return None, or raise the time limit."
        ) from None
    except (Exception, SystemExit) as error:
        _refuse(reward, given, _culprit(reward, given, timeout_seconds), f"raised {type(error).__name__}: {error}", cause=error)
    if hasattr(answer, "tolist"):  # an array of NumPy, JAX or PyTorch
        answer = answer.tolist()
    if not isinstance(answer, (list, tuple)):
        remedy = "; make it an ordinary function" if inspect.iscoroutine(answer) else ""
        raise RewardFault(f"The reward {reward.name!r} returned {_kind(answer)}, where a list of {num} numbers is expected{remedy}.")
    if len(answer) != num:
        raise RewardFault(f"The reward {reward.name!r} returned {len(answer)} scores for {num} completions; return one for each.")
    scores = np.empty(num, np.float32)
    for index, value in enumerate(answer):
        value = value.tolist() if hasattr(value, "tolist") else value
        if value is None:
            scores[index] = math.nan
            continue
        if not isinstance(value, numbers.Real):
            _refuse(reward, given, index, f"gave {_kind(value)}; return a number, or None where there is no score")
        with np.errstate(over="ignore"), contextlib.suppress(OverflowError):
            scores[index] = math.inf  # unless it can be held
            scores[index] = float(value)
        if not math.isfinite(scores[index]):
            _refuse(reward, given, index, f"gave {value}; return a finite number, or None where there is no score")
    return scores


def _call(reward: Reward, given: dict[str, list[Any]], timeout_seconds: float | None) -> Any:
    # A copy, since what a function does to its arguments must not reach the data or the next function.
    arguments = copy.deepcopy({name: value for name, value in given.items() if reward.arguments is None or name in reward.arguments})
    if timeout_seconds is None:
        return reward.function(**arguments)
    outcome: list[tuple[Any, BaseException | None]] = []

    def work() -> None:
        try:
            outcome.append((reward.function(**arguments), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=work, daemon=True)  # which does not keep the program from ending
    thread.start()
    thread.join(timeout_seconds)
    if not outcome:
        raise TooSlow
    answer, error = outcome[0]
    if error is not None:
        raise error
    return answer


def _culprit(reward: Reward, given: dict[str, list[Any]], timeout_seconds: float | None) -> int | None:
    """The first sample on which the function raises when it is called with it alone."""
    for index in range(len(given["completions"])):
        try:
            _call(reward, {name: values[index : index + 1] for name, values in given.items()}, timeout_seconds)
        except (Exception, SystemExit):
            return index
    return None


def _refuse(reward: Reward, given: dict[str, list[Any]], index: int | None, problem: str, cause: BaseException | None = None) -> NoReturn:
    num = len(given["completions"])
    if index is None:
        raise RewardFault(f"The reward {reward.name!r}, called with {num} completions, {problem}; alone none of them does.") from cause
    sample = {name: values[index] for name, values in given.items()}
    quoted = "".join(f"\n  {name.removesuffix('s')}: {_excerpt(sample[name])}" for name in ("prompts", "completions"))
    raise RewardFault(f"The reward {reward.name!r}, on completion {index + 1} of {num}, {problem}.{quoted}") from cause


def _excerpt(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= EXCERPT else f"{text[:EXCERPT]}..."


def _kind(value: Any) -> str:
    return "None" if value is None else f"{type(value).__name__} ({_excerpt(value)})"
