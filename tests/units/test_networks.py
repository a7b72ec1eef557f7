"""Networks: what the built-in one computes, what a user's own may be, and that a name never makes a module load."""

import functools
import sys
import types
from typing import get_args, get_type_hints

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete

from surefoot import PPO, networks
from surefoot.networks import (
    MLP,
    Pure,
    build_torso,
    channels_last,
    find_factory,
    image_shape,
    network_name,
    orthogonal_linear,
    own_network,
    register,
)

SPACE = Box(-1.0, 1.0, (3,))
OBS = np.array([0.5, -2.0, 1.0], np.float32)
SHAPE = {"hidden": (8,), "activation": "tanh"}


class Torso(eqx.Module):
    mlp: eqx.nn.MLP

    def __init__(self, space, key):
        self.mlp = eqx.nn.MLP(3, 5, 4, depth=1, key=key)

    def __call__(self, obs):
        return self.mlp(obs)


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(networks, "_factories", {})


# The built-in network


@pytest.mark.parametrize("gain", [0.01, 1.0, 2**0.5])
@pytest.mark.parametrize(("in_size", "out_size"), [(3, 7), (7, 3), (4, 4)])
def test_weights_are_orthogonal_times_the_gain(x64, in_size, out_size, gain):
    layer = orthogonal_linear(in_size, out_size, gain, jax.random.key(0))
    weight = np.asarray(layer.weight)
    gram = weight @ weight.T if out_size <= in_size else weight.T @ weight
    np.testing.assert_allclose(gram, gain**2 * np.eye(min(in_size, out_size)), rtol=1e-12, atol=1e-12)
    assert weight.shape == (out_size, in_size)
    assert layer.bias.shape == (out_size,)
    assert not layer.bias.any()


@pytest.mark.parametrize("activation", get_args(get_type_hints(PPO)["activation"]))
def test_mlp_is_its_layers_one_after_the_other(activation):
    """On a dictionary, so that the encoding is part of it."""
    space = Dict(place=Discrete(2, start=1), speed=Box(-9.0, 9.0, (2,)))
    obs = {"place": np.int32(2), "speed": np.array([3.0, -0.5], np.float32)}
    mlp = MLP(space, jax.random.key(0), hidden=(4, 6), activation=activation)
    x = np.array([0.0, 1.0, 3.0, -0.5])
    for layer in mlp.layers:
        x = np.asarray(getattr(jax.nn, activation)(x @ np.asarray(layer.weight, np.float64) + np.asarray(layer.bias)))
    np.testing.assert_allclose(jax.jit(lambda mlp, obs: mlp(obs))(mlp, obs), x, rtol=1e-5, atol=1e-6)
    assert [layer.weight.shape for layer in mlp.layers] == [(4, 4), (4, 6)]
    gains = [np.linalg.norm(np.asarray(layer.weight), ord=2) for layer in mlp.layers]
    np.testing.assert_allclose(gains, 2**0.5, rtol=1e-5)


def test_layers_of_an_mlp_differ():
    first, second = MLP(SPACE, jax.random.key(0), hidden=(3, 3)).layers
    assert np.abs(first.weight - second.weight).max() > 0.1


def test_an_mlp_without_hidden_layers_passes_the_observation_on():
    torso, size = build_torso("mlp", SPACE, jax.random.key(0), hidden=(), activation="tanh")
    assert size == 3
    np.testing.assert_array_equal(torso(OBS), OBS)


@pytest.mark.parametrize("hidden", [(0,), (64, -1)])
def test_hidden_layers_have_a_width(hidden):
    with pytest.raises(ValueError, match=r"hidden expects widths of at least 1, got \("):
        build_torso("mlp", SPACE, jax.random.key(0), hidden=hidden, activation="tanh")


# Networks for images


def as_kernel(convolution, in_channels):
    """The weights of a `Convolution` as [rows, columns, in, out]."""
    size, stride = convolution.size, convolution.stride
    across = size // stride
    weight = np.asarray(convolution.layer.weight).reshape(-1, across, across, stride, stride, in_channels)
    return weight.transpose(1, 3, 2, 4, 5, 0).reshape(size, size, in_channels, -1)


def convolved(convolution, x, padding=0):
    """[H, W, C] by window after window."""
    x = np.pad(x, [(padding, padding)] * 2 + [(0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(x, (convolution.size,) * 2, axis=(0, 1))[
        :: convolution.stride, :: convolution.stride
    ]
    return np.einsum("hwcij,ijcd->hwd", windows, as_kernel(convolution, x.shape[-1])) + np.asarray(convolution.layer.bias)


def pooled(x):
    """[H, W, C] of which the last row is beyond the image where H is even, and the first too where it is odd."""
    x = np.pad(x, [((size % 2), 1) for size in x.shape[:2]] + [(0, 0)], constant_values=-np.inf)
    return np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(0, 1))[::2, ::2].max((-2, -1))


@functools.cache
def drawn(name, *shape):
    """A torso for bytes of this shape, its many arrays from one program."""
    space = Box(0, 255, shape, np.uint8)
    return jax.jit(lambda key: build_torso(name, space, key, **SHAPE)[0])(jax.random.key(0))


def with_biases(torso):
    """All biases drawn, so that it shows where one is left out."""
    leaves, structure = jax.tree.flatten(torso)
    rng = np.random.default_rng(1)
    return structure.unflatten([rng.normal(size=x.shape).astype(np.float32) if x.ndim == 1 else x for x in leaves])


def relu(x):
    return np.maximum(x, 0)


call = jax.jit(lambda torso, obs: torso(obs))


def test_nature_is_three_convolutions_and_a_layer():
    torso = with_biases(drawn("nature", 4, 45, 51))  # 45 and 51 leave pixels over that no window reaches
    obs = np.random.default_rng(0).integers(0, 256, (4, 45, 51), np.uint8)
    x = obs.transpose(1, 2, 0) / 255
    for convolution in torso.convolutions:
        x = relu(convolved(convolution, x))
    expected = relu(x.ravel() @ np.asarray(torso.hidden.weight) + np.asarray(torso.hidden.bias))
    np.testing.assert_allclose(call(torso, obs), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(call(torso, obs / np.float32(255)), expected, rtol=1e-4, atol=1e-4)  # floats are taken as they are
    assert [(c.layer.weight.shape[0], c.size, c.stride) for c in torso.convolutions] == [(32, 8, 4), (64, 4, 2), (64, 3, 1)]
    assert expected.shape == (512,)
    assert (expected > 0).any()


def test_impala_is_three_residual_stages_and_a_layer():
    torso = with_biases(drawn("impala", 4, 13, 18))
    obs = np.random.default_rng(0).integers(0, 256, (4, 13, 18), np.uint8)
    x = obs.transpose(1, 2, 0) / 255
    for stage in torso.stages:
        x = pooled(convolved(stage.first, x, 1))
        for one, other in (stage.residual[:2], stage.residual[2:]):
            x = x + convolved(other, relu(convolved(one, relu(x), 1)), 1)
    assert x.shape == (2, 3, 32)
    expected = relu(relu(x).ravel() @ np.asarray(torso.hidden.weight) + np.asarray(torso.hidden.bias))
    np.testing.assert_allclose(call(torso, obs), expected, rtol=1e-4, atol=1e-3)
    assert [stage.first.layer.weight.shape[0] for stage in torso.stages] == [16, 32, 32]
    assert expected.shape == (256,)


@pytest.mark.parametrize(("name", "size"), [("nature", (4, 45, 51)), ("impala", (4, 13, 18))])
def test_layers_of_networks_for_images_are_orthogonal_and_differ(name, size):
    torso = drawn(name, *size)
    weights = [x for x in jax.tree.leaves(torso) if x.ndim == 2]
    assert not any(x.any() for x in jax.tree.leaves(torso) if x.ndim == 1)
    assert len(weights) == {"nature": 4, "impala": 16}[name]
    for index, weight in enumerate(weights):
        gain = 1.0 if name == "impala" and index < 15 else 2**0.5
        np.testing.assert_allclose(np.linalg.svd(weight, compute_uv=False), gain, rtol=1e-4)
        assert all(np.abs(weight - other).max() > 0.01 for other in weights[:index] if other.shape == weight.shape)


@pytest.mark.parametrize(("shape", "axes"), [((4, 5, 6), (1, 2, 0)), ((5, 6, 3), (0, 1, 2)), ((2, 5, 6, 3), (1, 2, 0, 3))])
def test_channels_come_last_wherever_they_were(shape, axes):
    obs = np.arange(np.prod(shape)).reshape(shape)
    np.testing.assert_array_equal(channels_last(jnp.asarray(obs)), obs.transpose(axes).reshape(5, 6, -1))
    seen = image_shape("nature", Box(0, 255, shape, np.uint8), smallest=5)
    assert seen == (5, 6, np.prod(shape) // 30)


@pytest.mark.parametrize(
    "space", [SPACE, Box(0, 255, (4, 35, 84), np.uint8), Box(0, 255, (84, 35, 4), np.uint8), Box(0, 255, (84, 84)), Dict(a=SPACE)]
)
def test_what_is_no_image_is_refused(space):
    with pytest.raises(ValueError, match=r"The network 'nature' needs images of at least 36 x 36, .*; take 'mlp'\."):
        build_torso("nature", space, jax.random.key(0), **SHAPE)


BOARD = Box(0, 1, (10, 10, 4), np.bool_)


def test_minatar_s_network_is_a_convolution_and_a_layer():
    torso, size = build_torso("minatar", BOARD, jax.random.key(0), **SHAPE)
    obs = np.asarray(jax.random.bernoulli(jax.random.key(1), 0.3, (5, 10, 10, 4)))
    filters = torso.convolution.layer.weight.reshape(16, 3, 3, 4)  # by rows, columns and channels
    bias = jnp.linspace(-0.3, 0.3, 16)
    torso = eqx.tree_at(lambda torso: (torso.convolution.layer.bias, torso.hidden.bias), torso, (bias, jnp.linspace(-0.2, 0.2, 128)))
    seen = jax.lax.conv_general_dilated(obs.astype(np.float32), filters, (1, 1), "VALID", dimension_numbers=("NHWC", "OHWI", "NHWC"))
    flat = np.maximum(np.asarray(seen + bias), 0).reshape(5, 8 * 8 * 16)
    expected = np.maximum(flat @ np.asarray(torso.hidden.weight) + np.asarray(torso.hidden.bias), 0)
    np.testing.assert_allclose(jax.jit(jax.vmap(torso))(obs), expected, rtol=1e-5, atol=1e-5)
    assert size == 128
    assert (expected > 0).any(axis=1).all()
    for weight in (torso.convolution.layer.weight, torso.hidden.weight.T):
        gram = np.asarray(weight @ weight.T)
        np.testing.assert_allclose(gram, 2 * np.eye(len(gram)), atol=1e-5)


def test_bytes_reach_a_convolution_as_fractions_and_bits_as_they_are():
    torso, _ = build_torso("minatar", BOARD, jax.random.key(0), **SHAPE)
    bits = np.asarray(jax.random.bernoulli(jax.random.key(1), 0.3, (10, 10, 4)))
    np.testing.assert_allclose(torso(bits), torso(bits.astype(np.float32)), rtol=1e-6)
    np.testing.assert_allclose(torso(bits), torso(255 * bits.astype(np.uint8)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("space", [SPACE, Discrete(3), Box(0, 1, (2, 10, 2)), Dict(a=BOARD)])
def test_what_is_no_image_is_refused_by_a_network_for_images(space):
    with pytest.raises(ValueError, match=r"'minatar' needs images of at least 3 x 3, .* take 'mlp'"):
        build_torso("minatar", space, jax.random.key(0), **SHAPE)


# A user's own


def build(factory, space=SPACE):
    return build_torso(network_name(factory), space, jax.random.key(0), **SHAPE)


def test_a_module_of_five_lines_works_and_can_be_trained():
    torso, size = build(Torso)
    assert size == 5
    assert isinstance(torso, Pure)  # an eqx.nn.MLP holds its activation as a leaf, which no optimiser could step
    plain = Torso(SPACE, jax.random.key(0))
    np.testing.assert_array_equal(torso(OBS), plain(OBS))
    gradient = jax.jit(jax.grad(lambda torso: jnp.sum(torso(OBS) ** 2)))(torso)
    expected = eqx.filter_jit(eqx.filter_grad(lambda torso: jnp.sum(torso(OBS) ** 2)))(plain)
    assert len(jax.tree.leaves(gradient)) == 4
    for leaf, expected_leaf in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, expected_leaf, rtol=1e-6)
        assert np.abs(leaf).max() > 0
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, torso, gradient)
    assert np.abs(moved(OBS) - torso(OBS)).max() > 1e-3


def test_a_module_of_arrays_alone_is_taken_as_it_is():
    class Arrays(eqx.Module):
        weight: jax.Array
        width: int = eqx.field(static=True)

        def __init__(self, space, key):
            self.width, self.weight = 2, jnp.ones((2, 3))

        def __call__(self, obs):
            return self.weight @ obs

    torso, size = build(Arrays)
    assert isinstance(torso, Arrays)
    assert size == 2


def test_a_function_that_builds_a_torso_works():
    torso, size = build(lambda space, key: lambda obs: obs["a"] * 2.0, Dict(a=SPACE))
    assert size == 3
    np.testing.assert_array_equal(torso({"a": OBS}), OBS * 2)
    assert jax.tree.leaves(torso) == []


@pytest.mark.parametrize(
    ("output", "given"),
    [
        (lambda obs: jnp.sum(obs), r"float32\[\]"),
        (lambda obs: obs[None], r"float32\[1, 3\]"),
        (lambda obs: jnp.argsort(obs), r"int32\[3\]"),
        (lambda obs: {"features": obs}, "dict"),
        (lambda obs: None, "NoneType"),
    ],
)
def test_outputs_that_are_not_features_are_refused(output, given):
    with pytest.raises(ValueError, match=rf"must turn one observation into a float vector of features, but gave {given}\."):
        build(lambda space, key: output)


def test_what_cannot_be_called_is_refused():
    with pytest.raises(ValueError, match=r"gave int, which cannot be called on an observation"):
        build(lambda space, key: 3)


def test_arrays_that_cannot_be_trained_are_refused_with_the_remedy():
    class Table(eqx.Module):
        weight: jax.Array
        order: jax.Array

        def __init__(self, space, key):
            self.weight, self.order = jnp.ones(3), jnp.arange(3)

        def __call__(self, obs):
            return self.weight * obs[self.order]

    with pytest.raises(ValueError, match=r"holds an array of int32 in order, which cannot be trained; .*field\(static=True\)"):
        build(Table)


# Names


def test_a_network_is_recorded_by_module_and_name():
    assert network_name("mlp") == "mlp"
    assert {own_network(PPO(network=name)) for name in networks.BUILT_IN} == {None}
    assert own_network(PPO(network=Torso)) == f"{__name__}:Torso"
    assert network_name(Torso) == f"{__name__}:Torso"
    assert find_factory(f"{__name__}:Torso", import_module=False) is Torso


@pytest.mark.parametrize("given", [functools.partial(Torso), eqx.nn.Lambda(jnp.tanh)], ids=["partial", "instance"])
def test_what_has_no_name_is_refused(given):
    expected = r"network expects 'mlp', 'nature', 'impala', 'minatar', a class, or a function .* give the class itself and not an instance"
    with pytest.raises(ValueError, match=expected):
        network_name(given)


def test_networks_that_share_a_name_are_told_apart():
    factories = [lambda space, key, width=width: Torso(space, key) for width in (8, 16)]
    names = [network_name(factory) for factory in factories]
    assert names[1] == f"{names[0]}#2"
    assert [find_factory(name, import_module=False) for name in names] == factories
    assert [network_name(factory) for factory in factories] == names


def test_a_class_that_is_defined_again_takes_its_name_over():
    """As when a cell of a notebook is run once more."""
    new = type("Torso", (Torso,), {"__module__": __name__, "__qualname__": "Torso"})
    assert network_name(Torso) == network_name(new)
    assert find_factory(network_name(Torso), import_module=False) is Torso
    assert find_factory(network_name(new), import_module=False) is new


def test_a_registered_factory_stands_for_its_name():
    register("their_module:Theirs", Torso)
    assert find_factory("their_module:Theirs", import_module=False) is Torso


@pytest.mark.parametrize(("given", "nearest"), [("mpl", "mlp"), ("minitar", "minatar")])
def test_an_unknown_built_in_name_is_refused_with_the_nearest(given, nearest):
    with pytest.raises(
        ValueError, match=rf"There is no network '{given}', did you mean '{nearest}'\? Give 'mlp', .*, a class, or 'module:Class'\."
    ):
        find_factory(given, import_module=False)


@pytest.mark.parametrize(
    "name", ["os:system", "builtins:eval", "surefoot:train", "json:JSONDecoder", "json:nothing", "json:decoder.JSONDecoder"]
)
def test_a_name_reaches_nothing_but_modules_of_equinox(name):
    with pytest.raises(ValueError, match=f"The network '{name}' is not an equinox.Module class that this program has loaded"):
        find_factory(name, import_module=False)


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A module that leaves a file behind when it is imported."""
    trace = tmp_path / "was_here"
    source = f"import pathlib\npathlib.Path({str(trace)!r}).touch()\nfrom equinox.nn import Identity as Torso\n"
    (tmp_path / "planted_network.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "planted_network", raising=False)
    yield trace
    sys.modules.pop("planted_network", None)


def test_a_name_does_not_import_its_module(planted):
    for name in ("planted_network:Torso", "planted_network:Torso.nested"):
        with pytest.raises(ValueError, match="import the module 'planted_network' first, or hand the class over as network="):
            find_factory(name, import_module=False)
        with pytest.raises(ValueError, match="planted_network"):
            build_torso(name, SPACE, jax.random.key(0), **SHAPE)
    assert not planted.exists()
    assert "planted_network" not in sys.modules


def test_a_name_does_not_import_through_a_module_that_loads_lazily(planted, monkeypatch):
    lazy = types.ModuleType("lazy_network")
    lazy.__getattr__ = lambda name: __import__("planted_network").Torso
    monkeypatch.setitem(sys.modules, "lazy_network", lazy)
    with pytest.raises(ValueError, match="lazy_network"):
        find_factory("lazy_network:Torso", import_module=False)
    assert not planted.exists()
    assert lazy.Torso is eqx.nn.Identity  # what an ordinary look-up would have done
    assert planted.exists()


def test_a_user_can_ask_for_the_import(planted):
    assert find_factory("planted_network:Torso", import_module=True) is eqx.nn.Identity
    assert planted.exists()


def test_a_module_that_is_not_there_is_a_sentence():
    with pytest.raises(ValueError, match="No module named 'no_such_module'"):
        find_factory("no_such_module:Torso", import_module=True)
