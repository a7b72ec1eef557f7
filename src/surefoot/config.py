"""What every algorithm's configuration shares: refusing what it does not know, checking bounds, remembering what was set."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import numbers
import types
import typing
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, dataclass_transform


def nearest(name: str, known: Iterable[str]) -> str:
    """How to end a sentence about an unknown name: ", did you mean X?" with the closest of `known`, or a full stop."""
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else "."


@dataclass_transform(kw_only_default=True, frozen_default=True)
def configuration(cls: type) -> type:
    """A frozen keyword-only dataclass that refuses unknown settings by name and knows which ones were given (`explicit`)."""
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    plain_init = cls.__init__

    @functools.wraps(plain_init)
    def init(self: Any, **settings: Any) -> None:
        for name, value in settings.items():
            if name not in names:
                raise ValueError(f"{cls.__name__} has no setting {name!r}{nearest(name, names)} Settings: {', '.join(names)}.")
            settings[name] = _convert(f"{cls.__name__}.{name}", value, hints[name])
        object.__setattr__(self, "explicit", frozenset(settings))
        plain_init(self, **settings)

    cls.__init__ = init
    return cls


def _convert(name: str, value: Any, hint: Any) -> Any:
    """`value` as the annotated type where nothing is lost (1e3 for an int, a list for a tuple), else a ValueError."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    for option in options:
        origin = typing.get_origin(option) or option
        if origin is typing.Literal:
            if value in typing.get_args(option):
                return value
        elif origin in (int, float):
            is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)  # NumPy's scalars too
            with suppress(OverflowError):  # an integer beyond every float
                if is_number and (origin is float or float(value).is_integer()):
                    return origin(value)
        elif origin is tuple and isinstance(value, (tuple, list)):
            return tuple(_convert(name, item, typing.get_args(option)[0]) for item in value)
        elif origin is str and callable(value):
            return value  # a network given as a class: named by the configuration's own check
        elif isinstance(value, origin):
            return value
    expected = " or ".join(str(getattr(option, "__name__", option)) for option in options)
    if typing.get_origin(hint) is typing.Literal:
        expected = "one of " + ", ".join(repr(choice) for choice in typing.get_args(hint))
    raise ValueError(f"{name} expects {expected}, got {value!r} ({type(value).__name__}).")


def check_bounds(config: Any, **intervals: str) -> None:
    """Raise unless each named setting lies in its interval, written as in mathematics: "[0, 1]", "(0, inf)".

    None lies in every interval.
    """
    for name, interval in intervals.items():
        value = getattr(config, name)
        low, high = (float(end) for end in interval[1:-1].split(","))
        above = value is None or (value >= low if interval[0] == "[" else value > low)
        below = value is None or (value <= high if interval[-1] == "]" else value < high)
        if not (above and below):
            raise ValueError(f"{type(config).__name__}.{name} must lie in {interval}, got {value!r}.")


def refuse_unread(config: Any) -> None:
    """Raise where a setting is not at its default although nothing reads it: `config.unread` maps such names to what would."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name, needs in config.unread.items():
        if getattr(config, name) != defaults[name]:
            raise ValueError(f"{type(config).__name__}.{name} is for {needs} only; leave it out, or set {needs} too.")
