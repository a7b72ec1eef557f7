"""Spaces: what is refused, the way of actions to the environment and of observations to numbers, and JSON that can be trusted."""

import json
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Text, Tuple

from surefoot.spaces import (
    action_size,
    choices,
    encode,
    encoded_size,
    encoder,
    from_json,
    map_leaves,
    observation_dtype,
    to_environment,
    to_json,
    validate,
    zero_actions,
    zeros,
)

LARGEST = float(np.finfo(np.float32).max)
VECTOR = Box(-1.0, 1.0, (2,))
NESTED = Dict(
    outer=Dict(image=Box(0, 255, (2, 2, 1), np.uint8), speed=Box(-np.inf, np.inf, ())), goal=Discrete(3, start=-1), keys=MultiBinary([2])
)


# validate


@pytest.mark.parametrize(
    "space", [VECTOR, Discrete(3, start=-1), MultiDiscrete([2, 3]), MultiBinary(3), NESTED, Box(0, 255, (4, 4), np.uint8)]
)
def test_supported_observations_pass(space):
    validate(space, Discrete(2))


@pytest.mark.parametrize(
    "space",
    [Discrete(1, start=7), MultiDiscrete([[2, 3], [4, 1]]), MultiBinary((2, 2)), Box(-2.0, 3.0, ()), Box(-1.0, 1.0, (2, 3), np.float64)],
)
def test_supported_actions_pass(space):
    validate(VECTOR, space)


def crossed(space):
    """Gymnasium refuses crossed bounds too, but not of a space that is changed afterwards."""
    space.low, space.high = space.high, space.low
    return space


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (Text(5), r"observation space .* is not supported; use Box, Discrete, MultiDiscrete, MultiBinary or a Dict of them"),
        (Dict(a=VECTOR, b=Tuple([VECTOR])), r"observation space Tuple.* is not supported"),
        (crossed(Box(-1.0, 1.0, (2,))), r"observation space .* has low > high; mend its bounds"),
        (Dict(), r"observation space .* is empty"),
        (Box(0.0, 1.0, (0,)), r"observation space .* is empty"),
    ],
)
def test_observations_that_are_refused(space, message):
    with pytest.raises(ValueError, match=message):
        validate(space, Discrete(2))


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (Box(-np.inf, 1.0, (2,)), r"is unbounded; give it finite bounds, for example with gymnasium\.wrappers\.RescaleAction"),
        (Box(-1.0, np.inf, (2,)), "is unbounded"),
        (Box(np.float32(-1.0), np.array([1.0, np.inf], np.float32)), "is unbounded"),
        (Box(-LARGEST, LARGEST, (2,)), "is unbounded"),
        (crossed(Box(-1.0, 1.0, (2,))), "lower bound that is not below its upper bound"),
        (Box(np.array([0.0, 1.0], np.float32), np.array([1.0, 1.0], np.float32)), "lower bound that is not below its upper bound"),
        (Box(0, 5, (2,), np.int32), "holds integers; declare it MultiDiscrete, or a float Box"),
        (Box(-1.0, 1.0, (0,)), "is empty; a Box needs at least one number"),
        (Dict(a=Discrete(2)), "is not supported; use Discrete, MultiDiscrete, MultiBinary or a bounded Box"),
    ],
)
def test_actions_that_are_refused(space, message):
    with pytest.raises(ValueError, match=message) as error:
        validate(VECTOR, space)
    assert str(space) in str(error.value)


def test_an_empty_discrete_space_is_refused():
    space = Discrete(2)
    space.n = 0
    with pytest.raises(ValueError, match="is empty; every choice needs at least one action"):
        validate(VECTOR, space)


# Arrays


@pytest.mark.parametrize(
    ("space", "dtype"),
    [
        (VECTOR, np.float32),
        (Box(-1.0, 1.0, (2,), np.float64), np.float32),
        (Box(-1.0, 1.0, (2,), np.float16), np.float32),
        (Box(0, 255, (2,), np.uint8), np.uint8),
        (Box(0, 9, (2,), np.int64), np.int32),
        (Discrete(3), np.int32),
        (MultiBinary(3), np.int8),
    ],
)
def test_observations_are_kept_as_float32_or_small_integers(space, dtype):
    assert observation_dtype(space) == dtype
    buffer = zeros(space, 5, 2)
    assert (buffer.shape, buffer.dtype) == ((5, 2, *space.shape), dtype)
    assert not buffer.any()


def test_buffers_of_dictionaries():
    buffers = zeros(NESTED, 4)
    assert map_leaves(lambda space, x: (x.shape, x.dtype), NESTED, buffers) == {
        "outer": {"image": ((4, 2, 2, 1), np.uint8), "speed": ((4,), np.float32)},
        "goal": ((4,), np.int32),
        "keys": ((4, 2), np.int8),
    }


def test_map_leaves_walks_spaces_and_trees_together():
    first, second = {"a": 1, "b": {"c": 2}}, {"a": 10, "b": {"c": 20}}
    space = Dict(a=Discrete(3), b=Dict(c=Discrete(5)))
    assert map_leaves(lambda leaf, x, y: int(leaf.n) * x + y, space, first, second) == {"a": 13, "b": {"c": 30}}


# to_environment


@pytest.mark.parametrize("xp", [np, jnp])
@pytest.mark.parametrize("start", [-2, 0, 5])
def test_discrete_actions_are_offset(xp, start):
    actions = to_environment(Discrete(4, start=start), xp.arange(4, dtype=np.int32))
    assert isinstance(actions, np.ndarray) is (xp is np)
    assert actions.dtype == np.int32
    np.testing.assert_array_equal(actions, np.arange(4) + start)
    assert all(Discrete(4, start=start).contains(np.asarray(action)[()]) for action in actions)


@pytest.mark.parametrize("xp", [np, jnp])
def test_box_actions_span_the_bounds_of_each_dimension_and_are_clipped(xp):
    space = Box(np.array([-1.0, 0.0, -8.0], np.float32), np.array([3.0, 10.0, -4.0], np.float32))
    units = xp.asarray([[-1.0, -1.0, -1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.5, -0.5, 0.25], [-9.0, 9.0, 1.5]], dtype=np.float32)
    actions = to_environment(space, units)
    assert isinstance(actions, np.ndarray) is (xp is np)
    assert actions.dtype == np.float32
    expected = [[-1.0, 0.0, -8.0], [1.0, 5.0, -6.0], [3.0, 10.0, -4.0], [2.0, 2.5, -5.5], [-1.0, 10.0, -4.0]]
    np.testing.assert_array_equal(actions, np.array(expected, np.float32))


@pytest.mark.parametrize("xp", [np, jnp])
@pytest.mark.parametrize("leading", [(), (5,), (3, 5)])
@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
def test_box_actions_take_the_shape_of_the_space(xp, leading, shape):
    space = Box(0.0, 4.0, shape)
    units = np.random.default_rng(0).uniform(-1, 1, (*leading, int(np.prod(shape)))).astype(np.float32)
    actions = to_environment(space, xp.asarray(units))
    assert actions.shape == (*leading, *shape)
    np.testing.assert_allclose(actions, 2 * units.reshape((*leading, *shape)) + 2, rtol=1e-6)


def test_box_actions_have_the_dtype_of_the_space():
    assert to_environment(Box(-1.0, 1.0, (2,), np.float64), np.zeros((3, 2), np.float32)).dtype == np.float64
    assert to_environment(Box(-1.0, 1.0, (2,), np.float16), np.zeros((3, 2), np.float32)).dtype == np.float16


@pytest.mark.parametrize("xp", [np, jnp])
def test_no_action_leaves_the_space_by_rounding(xp):
    rng = np.random.default_rng(0)
    low, high = np.sort(rng.normal(scale=10, size=(2, 1000)), axis=0).astype(np.float32)
    space = Box(low, high)
    np.testing.assert_array_equal(to_environment(space, xp.full((1, 1000), -1, np.float32))[0], low)
    for unit in (1.0, np.nextafter(np.float32(1), np.float32(0)), 0.999):
        assert space.contains(np.asarray(to_environment(space, xp.full((1, 1000), unit, np.float32))[0]))


@pytest.mark.parametrize("xp", [np, jnp])
@pytest.mark.parametrize("leading", [(), (5,), (3, 5)])
@pytest.mark.parametrize(
    "space", [MultiDiscrete([[2, 3], [4, 1]], start=[[0, -1], [5, 2]]), MultiDiscrete([2, 2]), MultiBinary((2, 3))], ids=str
)
def test_vectors_of_choices_are_offset_and_take_the_shape_and_dtype_of_the_space(xp, leading, space):
    size = int(np.prod(space.shape))
    action = np.random.default_rng(0).integers(0, choices(space), size=(*leading, size)).astype(np.int32)
    taken = to_environment(space, xp.asarray(action))
    assert isinstance(taken, np.ndarray) == (xp is np)
    assert taken.shape == (*leading, *space.shape)
    start = getattr(space, "start", np.zeros(space.shape))
    np.testing.assert_array_equal(taken, action.reshape(taken.shape) + start)
    if xp is np:
        assert taken.dtype == space.dtype
        assert all(space.contains(one) for one in taken.reshape(-1, *space.shape))


def test_action_size_counts_logits_and_means():
    spaces = Discrete(4, start=2), MultiDiscrete([[2, 3], [4, 1]]), MultiBinary((2, 3)), Box(-1, 1, ()), Box(-1, 1, (2, 3))
    assert [action_size(space) for space in spaces] == [4, 10, 12, 1, 6]
    assert [choices(space) for space in spaces] == [(4,), (2, 3, 4, 1), (2,) * 6, None, None]


def test_actions_before_the_first_have_the_shape_and_kind_of_the_policys_own():
    for space, shape, kind in (
        (Discrete(4), (), "i"),
        (MultiDiscrete([2, 3]), (2,), "i"),
        (MultiBinary((2, 3)), (6,), "i"),
        (Box(-1, 1, ()), (1,), "f"),
    ):
        actions = zero_actions(space, 5, 2)
        assert (actions.shape, actions.dtype.kind) == ((5, 2, *shape), kind)


# encode


def encoded(space, obs):
    plan = encoder(space)
    vector = jax.jit(encode, static_argnums=0)(plan, obs)  # static: the plan has to be hashable
    assert vector.dtype == jnp.float32
    assert vector.shape == (encoded_size(plan),)
    return vector.tolist()


def test_categories_become_one_hot_counted_from_their_start():
    assert encoded(Discrete(3, start=-1), np.int32(0)) == [0, 1, 0]
    assert encoded(MultiDiscrete([2, 3], start=[5, -1]), np.array([6, -1], np.int32)) == [0, 1, 1, 0, 0]
    assert encoded(MultiDiscrete([[2, 2], [3, 1]]), np.array([[0, 1], [2, 0]], np.int32)) == [1, 0, 0, 1, 0, 0, 1, 1]
    assert encoded(MultiDiscrete([3, 2], np.uint8, start=[1, 1]), np.array([1, 2], np.uint8)) == [1, 0, 0, 0, 1]


def test_numbers_are_flattened_and_bytes_divided():
    assert encoded(MultiBinary([2, 2]), np.array([[0, 1], [1, 0]], np.int8)) == [0, 1, 1, 0]
    assert encoded(Box(-9, 9, (2, 2)), np.array([[1.5, -2.0], [3.0, 4.0]], np.float32)) == [1.5, -2, 3, 4]
    assert encoded(Box(-9, 9, ()), np.float32(2.5)) == [2.5]
    assert encoded(Box(0, 255, (1, 2), np.uint8), np.array([[0, 255]], np.uint8)) == [0, 1]
    assert encoded(Box(0, 255, (1,), np.uint8), np.array([51], np.uint8)) == pytest.approx([0.2], abs=1e-7)
    assert encoded(Box(0, 255, (1,), np.int32), np.array([51], np.int32)) == [51]


def test_dictionaries_are_concatenated_in_the_order_of_the_space():
    obs = {
        "outer": {"image": np.full((2, 2, 1), 255, np.uint8), "speed": np.float32(7)},
        "goal": np.int32(1),
        "keys": np.array([1, 0], np.int8),
    }
    assert list(NESTED.spaces) == ["outer", "goal", "keys"]
    assert encoded(NESTED, obs) == [1, 1, 1, 1, 7, 0, 0, 1, 1, 0]


# JSON

SPACES = [
    Discrete(3),
    Discrete(3, start=-1),
    MultiDiscrete([2, 3]),
    MultiDiscrete([[2, 3], [4, 1]], start=[[1, -1], [0, 5]]),
    MultiDiscrete([2, 3], np.uint8),
    MultiBinary([4]),
    MultiBinary([2, 3]),
    Box(-1.0, 1.0, (3,)),
    Box(-np.inf, np.inf, (2, 2)),
    Box(np.array([-1.0, -np.inf, 0.1], np.float32), np.array([np.inf, 0.25, 0.3], np.float32)),
    Box(0.1, 0.3, (), np.float64),
    Box(0, 255, (8, 8, 3), np.uint8),
    Box(-np.inf, np.inf, (2,), np.int64),
    Box(np.iinfo(np.int64).min, np.iinfo(np.int64).max, (2,), np.int64),
    Box(0, 1, (2,), bool),
    Box(0.0, 1.0, (0,)),
    NESTED,
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_spaces_survive_json(space):
    text = json.dumps(to_json(space), allow_nan=False)
    back = from_json(json.loads(text))
    assert json.dumps(to_json(back)) == text
    assert back.shape == space.shape
    if not isinstance(space, (Dict, MultiBinary)):  # Gymnasium tells MultiBinary(4) from MultiBinary([4]), which are one space
        assert back == space
        assert back.dtype == space.dtype
    assert encoder(back) == encoder(space)


def test_json_keeps_the_order_of_a_dictionary():
    """Gymnasium sorts a plain dictionary: a policy that was loaded would see its observations in another order."""
    for space in (Dict(b=VECTOR, a=VECTOR), Dict(OrderedDict(b=Dict(d=VECTOR, c=VECTOR), a=VECTOR))):
        assert list(space.spaces) == ["b", "a"]
        assert encoder(from_json(json.loads(json.dumps(to_json(space))))) == encoder(space)


def test_equal_bounds_are_written_once():
    assert to_json(Box(0, 255, (64, 64, 3), np.uint8)) == {
        "type": "Box",
        "low": ["0"],
        "high": ["255"],
        "shape": [64, 64, 3],
        "dtype": "uint8",
    }


def box(**changes):
    return {"type": "Box", "low": ["0"], "high": ["1"], "shape": [2], "dtype": "float32"} | changes


def nested(depth):
    data = {"type": "Discrete", "n": 2, "start": 0}
    for _ in range(depth):
        data = {"type": "Dict", "spaces": {"a": data}}
    return data


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        "Box",
        {},
        {"type": []},
        {"type": "Text"},
        {"type": "Dict"},
        {"type": "Dict", "spaces": [1]},
        {"type": "Dict", "spaces": {"a": None}},
        {"type": "Discrete", "n": 3},
        {"type": "Discrete", "n": 0, "start": 0},
        {"type": "Discrete", "n": "many", "start": 0},
        {"type": "Discrete", "n": float("inf"), "start": 0},
        {"type": "Discrete", "n": 10**40, "start": 0},
        {"type": "MultiDiscrete", "nvec": [2, 3], "start": [0], "dtype": "int64"},
        {"type": "MultiDiscrete", "nvec": [[1], [2, 3]], "start": [0], "dtype": "int64"},
        {"type": "MultiDiscrete", "nvec": ["a"], "start": [0], "dtype": "int64"},
        {"type": "MultiDiscrete", "nvec": [2], "start": [0], "dtype": "object"},
        {"type": "MultiDiscrete", "nvec": [10**40], "start": [0], "dtype": "int64"},
        {"type": "MultiBinary", "shape": [-1]},
        {"type": "MultiBinary", "shape": [10**6, 10**6]},
        {"type": "MultiBinary", "shape": 3},
        box(dtype="object"),
        box(dtype="S8"),
        box(dtype="i4,i4"),
        box(dtype="__import__('os')"),
        box(dtype=None),
        box(shape=[10**6, 10**6]),
        box(shape=[2**40, 2**40]),
        box(shape=[-2]),
        box(shape=[1] * 100),
        box(shape=[float("inf")]),
        box(low=["0", "0", "0"]),
        box(low=["2"]),
        box(low=["nan"]),
        box(low=0),
        box(low=[None]),
        box(high=["1e400"], dtype="uint8"),
        box(high=["256"], dtype="uint8"),
        nested(2000),
    ],
    ids=lambda data: str(data)[:60] if not isinstance(data, dict) or data.get("type") != "Dict" else "Dict",
)
@pytest.mark.filterwarnings("error")
def test_json_that_is_no_space_is_a_value_error(data):
    with pytest.raises(ValueError, match=r"\w"):  # whichever it is, it says something
        from_json(data)
