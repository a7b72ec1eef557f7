"""Networks: a torso turns one observation into features, heads turn features into numbers.

A torso is any `equinox.Module` built as `Torso(observation_space, key)` and called on one (normalised) observation.
A user's own class goes straight into a configuration: `PPO(network=MyTorso)`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from .config import nearest
from .spaces import encode, encoded_size, encoder, zeros
from .types import Observation, PyTree

TorsoFactory = Callable[[gymnasium.Space[Any], jax.Array], Any]


def orthogonal_linear(in_size: int, out_size: int, gain: float, key: jax.Array) -> eqx.nn.Linear:
    """A linear layer with orthogonal weights (Saxe et al. 2014) times `gain`, and zero bias."""
    layer = eqx.nn.Linear(in_size, out_size, key=key)
    weight = jax.nn.initializers.orthogonal(gain)(key, (out_size, in_size))
    return eqx.tree_at(lambda linear: (linear.weight, linear.bias), layer, (weight, jnp.zeros(out_size)))


class Hidden(eqx.Module):
    """A hidden linear layer [in] to [out], with orthogonal weights times sqrt(2) and zero bias.

    Its weights lie by inputs, which is the order in which products go through them, and for an MLP's first layer on the CPU a
    quarter of the time of the other order where gradients are taken. For heads, which have few outputs, the other order is faster.
    """

    weight: jax.Array  # [in, out]
    bias: jax.Array  # [out]

    def __init__(self, in_size: int, out_size: int, key: jax.Array):
        self.weight = jax.nn.initializers.orthogonal(2**0.5)(key, (out_size, in_size)).T
        self.bias = jnp.zeros(out_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.weight + self.bias


class MLP(eqx.Module):
    """A stack of fully connected layers on the flattened observation."""

    layers: tuple[Hidden, ...]
    activation: str = eqx.field(static=True)  # a function of jax.nn
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
        self.layers = tuple(Hidden(a, b, k) for a, b, k in zip(sizes, sizes[1:], keys, strict=False))

    def __call__(self, obs: Observation) -> jax.Array:
        x = encode(self.plan, obs)
        for layer in self.layers:
            x = getattr(jax.nn, self.activation)(layer(x))
        return x


SMALLEST = 36  # pixels a side, of which 'nature' leaves one


def image_shape(name: str, space: gymnasium.Space[Any], *, smallest: int) -> tuple[int, int, int]:
    """Height, width and channels of what the network `name` sees; ValueError where it is no image of `smallest` pixels a side."""
    shape = space.shape if isinstance(space, gymnasium.spaces.Box) else ()
    seen = jax.eval_shape(channels_last, jax.ShapeDtypeStruct(shape, jnp.uint8)).shape if len(shape) in (3, 4) else (0, 0, 0)
    if min(seen[:2]) < smallest:
        raise ValueError(
            f"The network {name!r} needs images of at least {smallest} x {smallest}, a Box of shape [height, width, channels], or [frames, "
            f"height, width] with or without colours behind it, and the observation space is {str(space)[:200]}; take 'mlp'."
        )
    return seen


def advice(config: Any, space: gymnasium.Space[Any]) -> str | None:
    """A sentence for who lets fully connected layers look at an image of bytes; None where there is nothing to say."""
    if getattr(config, "network", None) != "mlp" or space.dtype != np.uint8:
        return None
    with contextlib.suppress(ValueError):
        image_shape("nature", space, smallest=SMALLEST)
        return "the observation is an image, of which network='mlp' sees a list of numbers; network='nature' is made for images"
    return None


def channels_last(obs: jax.Array) -> jax.Array:
    """[H, W, C] of an image, of frames [K, H, W] (told apart by which end is shorter), or of frames in colour [K, H, W, C]."""
    if obs.ndim == 4:
        return obs.transpose(1, 2, 0, 3).reshape(*obs.shape[1:3], -1)
    return obs.transpose(1, 2, 0) if obs.shape[0] < obs.shape[2] else obs


def patches(x: jax.Array, size: int, stride: int) -> jax.Array:
    """[H, W, C] to what each step of a convolution sees, [H', W', size * size * C]; `stride` divides `size`.

    By blocks of stride x stride; in a block by rows, columns and channels.
    """
    assert size % stride == 0
    height, width, across = x.shape[0] // stride, x.shape[1] // stride, size // stride
    x = x[: height * stride, : width * stride].reshape(height, stride, width, -1).swapaxes(1, 2).reshape(height, width, -1)
    last = height - across + 1, width - across + 1
    return jnp.concatenate([x[i : i + last[0], j : j + last[1]] for i in range(across) for j in range(across)], axis=-1)


class Convolution(eqx.Module):
    """A convolution [H, W, C] to [H', W', D] as a linear layer on patches; bytes are divided by 255.

    On the CPU this takes a tenth of the time of XLA's own convolution where gradients are taken inside a loop.
    """

    layer: eqx.nn.Linear
    size: int = eqx.field(static=True)
    stride: int = eqx.field(static=True)

    def __init__(self, in_channels: int, out_channels: int, key: jax.Array, *, size: int, stride: int = 1, gain: float = 2**0.5):
        self.layer = orthogonal_linear(size * size * in_channels, out_channels, gain, key)
        self.size, self.stride = size, stride

    def __call__(self, x: jax.Array) -> jax.Array:
        seen = patches(x, self.size, self.stride)
        seen = seen.astype(jnp.float32) * (1.0 / 255.0) if seen.dtype == jnp.uint8 else seen
        return seen @ self.layer.weight.T + self.layer.bias


class Nature(eqx.Module):
    """The network for Atari of Mnih et al. 2015: three convolutions and a layer of 512."""

    convolutions: tuple[Convolution, ...]
    hidden: Hidden

    def __init__(self, observation_space: gymnasium.Space[Any], key: jax.Array):
        height, width, channels = image_shape("nature", observation_space, smallest=SMALLEST)
        *keys, last = jax.random.split(key, 4)
        convolutions = []
        for out_channels, size, stride, own_key in zip((32, 64, 64), (8, 4, 3), (4, 2, 1), keys, strict=True):
            convolutions.append(Convolution(channels, out_channels, own_key, size=size, stride=stride))
            height, width, channels = (height - size) // stride + 1, (width - size) // stride + 1, out_channels
        self.convolutions = tuple(convolutions)
        self.hidden = Hidden(height * width * channels, 512, last)

    def __call__(self, obs: Observation) -> jax.Array:
        x = channels_last(obs)
        for convolution in self.convolutions:
            x = jax.nn.relu(convolution(x))
        return jax.nn.relu(self.hidden(jnp.ravel(x)))


def max_pool(x: jax.Array) -> jax.Array:
    """The largest of 3 x 3 around every second pixel of [H, W, C]; what is beyond the image does not count."""
    for axis in (0, 1):
        size = -(-x.shape[axis] // 2)
        beyond = 2 * size + 1 - x.shape[axis]
        padding = [(0, 0)] * 3
        padding[axis] = beyond // 2, beyond - beyond // 2
        padded = jnp.pad(x, padding, constant_values=-jnp.inf)
        x = functools.reduce(jnp.maximum, [jax.lax.slice_in_dim(padded, i, i + 2 * size - 1, 2, axis) for i in range(3)])
    return x


class Stage(eqx.Module):
    """A convolution, pooling, and two residual blocks of two convolutions each."""

    first: Convolution
    residual: tuple[Convolution, ...]

    def __init__(self, in_channels: int, out_channels: int, key: jax.Array):
        first, *others = jax.random.split(key, 5)
        # A gain of the square root of 2, which keeps the scale from layer to layer, would double it in every residual block.
        self.first = Convolution(in_channels, out_channels, first, size=3, gain=1.0)
        self.residual = tuple(Convolution(out_channels, out_channels, key, size=3, gain=1.0) for key in others)

    def __call__(self, x: jax.Array) -> jax.Array:
        def same(convolution: Convolution, x: jax.Array) -> jax.Array:
            return convolution(jnp.pad(x, [(1, 1), (1, 1), (0, 0)]))

        x = max_pool(same(self.first, x))
        for one, other in (self.residual[:2], self.residual[2:]):
            x = x + same(other, jax.nn.relu(same(one, jax.nn.relu(x))))
        return x


class Impala(eqx.Module):
    """The residual network of Espeholt et al. 2018 (arXiv:1802.01561, figure 3): three stages and a layer of 256."""

    stages: tuple[Stage, ...]
    hidden: Hidden

    def __init__(self, observation_space: gymnasium.Space[Any], key: jax.Array):
        height, width, channels = image_shape("impala", observation_space, smallest=8)
        *keys, last = jax.random.split(key, 4)
        self.stages = tuple(Stage(a, b, k) for a, b, k in zip((channels, 16, 32), (16, 32, 32), keys, strict=True))
        self.hidden = Hidden(-(-height // 8) * -(-width // 8) * 32, 256, last)

    def __call__(self, obs: Observation) -> jax.Array:
        x = channels_last(obs)
        for stage in self.stages:
            x = stage(x)
        return jax.nn.relu(self.hidden(jnp.ravel(jax.nn.relu(x))))


class MinAtarTorso(eqx.Module):
    """The network for MinAtar of Young & Tian 2019 (arXiv:1903.03176): 16 filters of 3 x 3 and a layer of 128."""

    convolution: Convolution
    hidden: Hidden

    def __init__(self, observation_space: gymnasium.Space[Any], key: jax.Array):
        height, width, channels = image_shape("minatar", observation_space, smallest=3)
        first, last = jax.random.split(key)
        self.convolution = Convolution(channels, 16, first, size=3)
        self.hidden = Hidden((height - 2) * (width - 2) * 16, 128, last)

    def __call__(self, obs: Observation) -> jax.Array:
        return jax.nn.relu(self.hidden(jnp.ravel(jax.nn.relu(self.convolution(channels_last(obs))))))


def over_rows(function: Callable[..., Any], *rows: PyTree) -> Any:
    """`function` of every row of [T, N, ...], which are one batch to it.

    With two batch axes XLA transposes what the gradients of layers are products of: on the CPU a twelfth of PPO's update.
    """
    shape = jax.tree.leaves(rows)[0].shape[:2]
    result = jax.vmap(function)(*jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows))
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), result)


class Pure(eqx.Module):
    """A module split into its arrays, which are trained, and everything else, which is not: functions become static."""

    arrays: PyTree
    static: PyTree = eqx.field(static=True)

    def __call__(self, obs: Observation) -> jax.Array:
        return eqx.combine(self.arrays, self.static)(obs)


IMAGE_TORSOS: dict[str, TorsoFactory] = {"nature": Nature, "impala": Impala, "minatar": MinAtarTorso}
BUILT_IN = "mlp", *IMAGE_TORSOS
CHOICES = ", ".join(map(repr, BUILT_IN))
_factories: dict[str, TorsoFactory] = {}


def network_name(network: str | TorsoFactory) -> str:
    """The name under which a configuration records `network`: itself, or `module:qualified name` of a class or function."""
    if isinstance(network, str):
        return network
    if not hasattr(network, "__qualname__"):
        raise ValueError(
            f"network expects {CHOICES}, a class, or a function (observation_space, key) that builds a torso, got {network!r:.80}; "
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
    """The name of the network that a user gave to a configuration; None where it is built in, or there is no such setting."""
    name: str = getattr(config, "network", "mlp")
    return None if name in BUILT_IN else name


def find_factory(name: str, *, import_module: bool) -> TorsoFactory:
    """What `network_name` named: registered, or an `equinox.Module` class of a module that the program has loaded.

    A name can come from a file, so it must not reach any other callable. Only a user's own command may `import_module`.
    """
    if name in _factories:
        return _factories[name]
    module_name, _, attribute = name.partition(":")
    if not attribute:
        raise ValueError(f"There is no network {name!r}{nearest(name, BUILT_IN)} Give {CHOICES}, a class, or 'module:Class'.")
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
    elif name in IMAGE_TORSOS:
        torso = IMAGE_TORSOS[name](observation_space, key)
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
