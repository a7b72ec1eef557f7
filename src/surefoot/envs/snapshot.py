"""The state of one Gymnasium environment as arrays and JSON, for a resume that goes on bit for bit. Nothing is pickled.

What an environment holds between two steps is known here by name, for its exact class: a subclass may hold more. An
environment that is not listed takes part by offering, on its unwrapped class,
`get_state() -> (dict of arrays, JSON object)` and `set_state(arrays, info)` for whatever its generator `np_random` and
its wrappers do not hold; both of these are saved here.
"""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import gymnasium
import numpy as np
from gymnasium import wrappers
from gymnasium.envs import classic_control, toy_text

_BASE_STATE: dict[type, tuple[str, ...]] = {
    classic_control.CartPoleEnv: ("state",),
    classic_control.PendulumEnv: ("state",),
    classic_control.AcrobotEnv: ("state",),
    classic_control.MountainCarEnv: ("state",),
    classic_control.Continuous_MountainCarEnv: ("state",),
    toy_text.FrozenLakeEnv: ("s", "lastaction"),
    toy_text.CliffWalkingEnv: ("s", "lastaction"),
    toy_text.TaxiEnv: ("s", "lastaction", "fickle_step"),
    toy_text.BlackjackEnv: ("player", "dealer"),
}
# Wrappers that hold nothing, or nothing but what is named; any other may hold what cannot be seen from here.
_WRAPPER_STATE: dict[type, tuple[str, ...]] = {
    wrappers.TimeLimit: ("_elapsed_steps",),
    wrappers.OrderEnforcing: ("_has_reset",),
    wrappers.PassiveEnvChecker: (),
    wrappers.ClipAction: (),
    wrappers.RescaleAction: (),
    wrappers.DiscretizeAction: (),
    wrappers.ClipReward: (),
    wrappers.FilterObservation: (),
    wrappers.FlattenObservation: (),
    wrappers.GrayscaleObservation: (),
    wrappers.ResizeObservation: (),
    wrappers.ReshapeObservation: (),
    wrappers.RescaleObservation: (),
    wrappers.DtypeObservation: (),
    wrappers.DiscretizeObservation: (),
}

Arrays = dict[str, np.ndarray[Any, Any]]


def is_exact(env: gymnasium.Env[Any, Any]) -> bool:
    """Whether `save` gets everything that `env` holds. Call it after a reset."""
    *outer, base = _layers(env)
    if any(type(layer) not in _WRAPPER_STATE for layer in outer):
        return False
    if env.unwrapped._np_random is not None and not isinstance(env.unwrapped.np_random.bit_generator, np.random.PCG64):
        return False
    return type(base) in _BASE_STATE or _is_mujoco(base) or _offers_state(base)


def save(env: gymnasium.Env[Any, Any]) -> tuple[Arrays, dict[str, Any]]:
    """(arrays, JSON object) from which `load` restores an environment that was built the same way."""
    *outer, base = _layers(env)
    arrays: Arrays = {}
    info: dict[str, Any] = {"wrappers": [{name: getattr(layer, name) for name in _WRAPPER_STATE[type(layer)]} for layer in outer]}
    if _is_mujoco(base):
        arrays = _save_mujoco(base)
    elif type(base) in _BASE_STATE:
        for name in _BASE_STATE[type(base)]:
            value = getattr(base, name)
            if isinstance(value, (np.ndarray, tuple)):
                arrays[name] = np.array(value)
            else:
                info[name] = value.item() if isinstance(value, np.generic) else copy.copy(value)
    else:
        own_arrays, info["own"] = base.get_state()  # type: ignore[attr-defined]
        arrays = {name: np.array(array) for name, array in own_arrays.items()}
    generator = env.unwrapped._np_random
    info["generator"] = None if generator is None else generator.bit_generator.state
    return arrays, info


def load(env: gymnasium.Env[Any, Any], arrays: Arrays, info: dict[str, Any]) -> None:
    """Put `env` where `save` found it."""
    *outer, base = _layers(env)
    for layer, values in zip(outer, info["wrappers"], strict=True):
        for name in _WRAPPER_STATE[type(layer)]:
            setattr(layer, name, values[name])
    if _is_mujoco(base):
        _load_mujoco(base, arrays)
    elif type(base) in _BASE_STATE:
        for name in _BASE_STATE[type(base)]:
            setattr(base, name, arrays[name].copy() if name in arrays else copy.copy(info[name]))
    else:
        base.set_state(arrays, info["own"])  # type: ignore[attr-defined]
    if info["generator"] is not None:
        env.unwrapped.np_random.bit_generator.state = info["generator"]


def _layers(env: gymnasium.Env[Any, Any]) -> list[gymnasium.Env[Any, Any]]:
    """From the outermost wrapper to the environment itself."""
    layers = [env]
    while isinstance(layers[-1], gymnasium.Wrapper):
        layers.append(layers[-1].env)
    return layers


def _is_mujoco(base: gymnasium.Env[Any, Any]) -> bool:
    """By name: the classes can be imported only where MuJoCo is installed."""
    return re.fullmatch(r"gymnasium\.envs\.mujoco\.\w+_v5", type(base).__module__) is not None


def _save_mujoco(base: Any) -> Arrays:
    import mujoco

    kind = mujoco.mjtState.mjSTATE_INTEGRATION  # the warm start of the solver among it
    state = np.zeros(mujoco.mj_stateSize(base.model, kind))
    mujoco.mj_getState(base.model, base.data, state, kind)
    # Ant and Humanoid subtract these, which lag the state by a part of a step, from those after the next step.
    return {"simulation": state, "xpos": base.data.xpos.copy(), "xipos": base.data.xipos.copy()}


def _load_mujoco(base: Any, arrays: Arrays) -> None:
    import mujoco

    mujoco.mj_setState(base.model, base.data, arrays["simulation"], mujoco.mjtState.mjSTATE_INTEGRATION)
    base.data.xpos[:], base.data.xipos[:] = arrays["xpos"], arrays["xipos"]


def _offers_state(base: gymnasium.Env[Any, Any]) -> bool:
    if not (callable(getattr(base, "get_state", None)) and callable(getattr(base, "set_state", None))):
        return False
    try:  # methods of these names may well mean something else
        arrays, info = base.get_state()  # type: ignore[attr-defined]
        json.dumps(info)
        return isinstance(info, dict) and all(np.asarray(array).dtype.kind in "biuf" for array in arrays.values())
    except Exception:
        return False
