"""Networks: a torso turns one observation into features, heads turn features into numbers.

A torso is any `equinox.Module` built as `Torso(observation_space, key)` and called on one (normalised) observation.
A user's own class goes straight into a configuration: `PPO(network=MyTorso)`.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp

from .config import nearest
from .spaces import encode, encoded_size, encoder, zeros
from .types import Observation, PyTree

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "elu": jax.nn.elu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
}
TorsoFactory = Callable[[gymnasium.Space[Any], jax.Array], Any]


def orthogonal_linear(in_size: int, out_size: int, gain: float, key: jax.Array) -> eqx.nn.Linear:
    """A linear layer with orthogonal weights (Saxe et al. 2014) times `gain`, and zero bias."""
    layer = eqx.nn.Linear(in_size, out_size, key=key)
    weight = jax.nn.initializers.orthogonal(gain)(key, (out_size, in_size))
    return eqx.tree_at(lambda linear: (linear.weight, linear.bias), layer, (weight, jnp.zeros(out_size)))


class MLP(eqx.Module):
    """A stack of fully connected layers on the flattened observation."""

    layers: tuple[eqx.nn.Linear, ...]
    activation: str = eqx.field(static=True)
    plan: tuple[Any, ...] = eqx.field(static=True)

    def __init__(
        self, observation_space: gymnasium.Space[Any], key: jax.Array, *, hidden: Sequence[int] = (64, 64), activation: str = "tanh"
    ):
        if min(hidden, default=1) < 1:
            raise ValueError(f"hidden expects widths of at least 1, got {tuple(hidden)}.")
        self.plan = encoder(observation_space)
        self.activation = activation
        sizes = [encoded_size(self.plan), *hidden]
        keys = jax.random.split(key, len(hidden))
        self.layers = tuple(orthogonal_linear(a, b, 2**0.5, k) for a, b, k in zip(sizes, sizes[1:], keys, strict=False))

    def __call__(self, obs: Observation) -> jax.Array:
        x = encode(self.plan, obs)
        for layer in self.layers:
            x = ACTIVATIONS[self.activation](layer(x))
        return x


class Pure(eqx.Module):
    """A module split into its arrays, which are trained, and everything else, which is not: functions become static."""

    arrays: PyTree
    static: PyTree = eqx.field(static=True)

    def __call__(self, obs: Observation) -> jax.Array:
        return eqx.combine(self.arrays, self.static)(obs)


_factories: dict[str, TorsoFactory] = {}


def network_name(network: str | TorsoFactory) -> str:
    """The name under which a configuration records `network`: itself, or `module:qualified name` of a class or function."""
    if isinstance(network, str):
        return network
    if not hasattr(network, "__qualname__"):
        raise ValueError(
            f"network expects 'mlp', a class, or a function (observation_space, key) that builds a torso, got {network!r:.80}; "
            "give the class itself and not an instance, and a def in place of a functools.partial."
        )
    name = first = f"{network.__module__}:{network.__qualname__}"
    number = 1
    while "<" in first and _factories.get(name, network) is not network:  # lambdas and local classes share their names
        number += 1
        name = f"{first}#{number}"
    register(name, network)
    return name


def register(name: str, factory: TorsoFactory) -> None:
    """Let `name`, as a policy's file has it, stand for `factory`."""
    _factories[name] = factory


def own_network(config: Any) -> str | None:
    """The name of the network that a user gave to a configuration; None where it is 'mlp', or there is no such setting."""
    name: str = getattr(config, "network", "mlp")
    return None if name == "mlp" else name


def find_factory(name: str, *, import_module: bool) -> TorsoFactory:
    """What `network_name` named: registered, or an `equinox.Module` class of a module that the program has loaded.

    A name can come from a file, so it must not reach any other callable. Only a user's own command may `import_module`.
    """
    if name in _factories:
        return _factories[name]
    module_name, _, attribute = name.partition(":")
    if not attribute:
        raise ValueError(f"There is no network {name!r}{nearest(name, ['mlp'])} Give 'mlp', a class, or 'module:Class'.")
    if import_module:
        try:
            importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise ValueError(f"The network {name!r}: {error}; is the module on Python's path?") from error
    target: Any = sys.modules.get(module_name)
    for part in attribute.split("."):
        target = inspect.getattr_static(target, part, None)  # an ordinary look-up can make a module import others
    if not (isinstance(target, type) and issubclass(target, eqx.Module)):
        raise ValueError(
            f"The network {name!r} is not an equinox.Module class that this program has loaded; "
            f"import the module {module_name!r} first, or hand the class over as network=..."
        )
    return target


def build_torso(
    name: str, observation_space: gymnasium.Space[Any], key: jax.Array, *, hidden: Sequence[int], activation: str
) -> tuple[Callable[[Observation], jax.Array], int]:
    """The torso called `name` and its number of features; a torso that does not give a float vector is refused."""
    if name == "mlp":
        torso = MLP(observation_space, key, hidden=hidden, activation=activation)
    else:
        torso: Any = find_factory(name, import_module=False)(observation_space, key)
        if not callable(torso):
            raise ValueError(f"The network {name!r} gave {type(torso).__name__}, which cannot be called on an observation.")
        for path, leaf in jax.tree_util.tree_leaves_with_path(torso):
            if eqx.is_array(leaf) and not eqx.is_inexact_array(leaf):
                raise ValueError(
                    f"The network {name!r} holds an array of {leaf.dtype} in {jax.tree_util.keystr(path)[1:]}, which cannot be trained; "
                    "make the field a tuple of numbers with equinox.field(static=True), and an array of it where it is used."
                )
        arrays, static = eqx.partition(torso, eqx.is_inexact_array)
        if jax.tree.leaves(static):
            torso = Pure(arrays, static)
    features = eqx.filter_eval_shape(torso, jax.tree.map(jnp.asarray, zeros(observation_space)))
    if getattr(features, "ndim", None) != 1 or not jnp.issubdtype(features.dtype, jnp.floating):
        given = f"{features.dtype}{list(features.shape)}" if hasattr(features, "shape") else type(features).__name__
        raise ValueError(f"The network {name!r} must turn one observation into a float vector of features, but gave {given}.")
    return torso, features.shape[0]
